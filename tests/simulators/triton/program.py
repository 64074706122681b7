"""Asks a server at HOST:PORT with NVIDIA's client, over `http` or `grpc`; prints what it found as JSON.

Runs in an environment of its own (`pins.txt`), with nothing of this project.
"""

import importlib
import json
import sys

import numpy as np

kind, address, *rest = sys.argv[1:]
triton = importlib.import_module(f"tritonclient.{kind}")
client = triton.InferenceServerClient(address)
as_json = {} if kind == "http" else {"as_json": True}
VALUES = {
    "float32": ("FP32", np.array([[1.5, -2], [3, 4], [0, 1e-30]], np.float32)),
    "float64": ("FP64", np.array([[1e300, -2], [3, 4], [5, 6]], np.float64)),
    "int8": ("INT8", np.array([[-128, 127], [3, 4], [5, 6]], np.int8)),
    "uint8": ("UINT8", np.array([[0, 255], [3, 4], [5, 6]], np.uint8)),
    "int32": ("INT32", np.array([[-(2**31), 2**31 - 1], [3, 4], [5, 6]], np.int32)),
    "int64": ("INT64", np.array([[-(2**63), 2**63 - 1], [3, 4], [5, 6]], np.int64)),
    "bool": ("BOOL", np.array([[True, False], [False, True], [True, True]])),
    "float16": ("FP16", np.array([[0.5, 65504], [-1, 6e-8], [5, 6]], np.float16)),
    "int16": ("INT16", np.array([[-(2**15), 2**15 - 1], [3, 4], [5, 6]], np.int16)),
    "uint16": ("UINT16", np.array([[0, 2**16 - 1], [3, 4], [5, 6]], np.uint16)),
    "uint32": ("UINT32", np.array([[0, 2**32 - 1], [3, 4], [5, 6]], np.uint32)),
    "uint64": ("UINT64", np.array([[0, 2**64 - 1], [3, 4], [5, 6]], np.uint64)),
    "string": ("BYTES", np.array([["", "a"], ["héllo", "日本"], ["x" * 300, "\x00"]], object)),
}


def ask(binary_in, binary_out, **options):
    """Return which dtypes do not come back as they went."""
    inputs, outputs = [], []
    for name, (datatype, array) in VALUES.items():
        tensor = triton.InferInput(f"{name}_in", array.shape, datatype)
        is_binary = binary_in or name == "float16"
        tensor.set_data_from_numpy(array, **({"binary_data": is_binary} if kind == "http" else {}))
        inputs.append(tensor)
        is_binary = binary_out or name == "float16"
        outputs.append(
            triton.InferRequestedOutput(f"{name}_out", **({"binary_data": is_binary} if kind == "http" else {}))
        )
    wanted = None if binary_out is None else outputs
    result = client.infer("echo", inputs, outputs=wanted, **options)
    wrong = []
    for name, (_, array) in VALUES.items():
        found = result.as_numpy(f"{name}_out")
        if name == "string":
            found = np.array(
                [[each.decode() if isinstance(each, bytes) else each for each in row] for row in found], object
            )
        if found.shape != array.shape or found.dtype != array.dtype or not np.array_equal(found, array):
            wrong.append(f"{name}: {found!r}")
    response = result.get_response() if kind == "http" else result.get_response(as_json=True)
    return {"wrong": wrong, "id": response.get("id", ""), "version": response["model_version"]}


def fail(call):
    """Return what the server says of a call that it is to refuse."""
    try:
        call()
    except triton.InferenceServerException as error:
        return [str(error.status()), error.message()]
    return None


def list_fields():
    """Return number, type and whether it is a list of every field of the protocol, by message and name."""
    from tritonclient.grpc import model_config_pb2, service_pb2

    waiting = [
        each for file in (service_pb2, model_config_pb2) for each in file.DESCRIPTOR.message_types_by_name.values()
    ]
    fields = {}
    while waiting:
        message = waiting.pop()
        waiting += message.nested_types
        fields[message.full_name] = {each.name: [each.number, each.type, each.is_repeated] for each in message.fields}
    return fields


def ask_wrongly():
    tensor = triton.InferInput("float32_in", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 2), np.float32))
    client.infer("echo", [tensor])


found = {
    "live": client.is_server_live(),
    "ready": client.is_server_ready(),
    "model_ready": [client.is_model_ready("echo"), client.is_model_ready("echo", "1"), client.is_model_ready("other")],
    "server": client.get_server_metadata(**as_json),
    "metadata": client.get_model_metadata("echo", **as_json),
    "config": client.get_model_config("echo", **as_json),
    "binary": ask(True, True, request_id="7"),
    "json": ask(False, False),
    "mixed": ask(True, False, model_version="1", sequence_id=3, sequence_start=True),
    "all": ask(True, None),
    "refused": [
        fail(ask_wrongly),
        fail(lambda: client.infer("other", [])),
        fail(lambda: client.load_model("echo")),
        fail(lambda: client.unload_model("echo")),
    ],
    "statistics": client.get_inference_statistics("echo", **as_json),
    "all_statistics": client.get_inference_statistics(**as_json),
    "index": client.get_model_repository_index(**as_json),
}
if kind == "grpc":
    found["fields"] = list_fields()
print(json.dumps(found))
