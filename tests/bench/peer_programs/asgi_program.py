"""The least that serves binary tensors from uvicorn: raw ASGI, and one run for all requests of a turn of the loop.

It knows its model's one input and checks nothing; what serves more in earnest costs more. Runs in an environment of
its own.
"""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import onnxruntime as ort

Send = Callable[[dict[str, Any]], Awaitable[None]]

options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(os.environ["GRAPH_PATH"], options)
name, row_shape = session.get_inputs()[0].name, session.get_inputs()[0].shape[1:]
output_name = session.get_outputs()[0].name
waiting: list[tuple[np.ndarray, asyncio.Future]] = []


def run_all() -> None:
    rows = list(waiting)
    waiting.clear()
    (outputs,) = session.run(None, {name: np.concatenate([row for row, _ in rows])})
    for number, (_, future) in enumerate(rows):
        future.set_result(outputs[number : number + 1])


async def infer(scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]]) -> tuple[bytes, int]:
    message = await receive()
    body = message["body"]
    while message["more_body"]:
        message = await receive()
        body += message["body"]
    start = int(dict(scope["headers"])[b"inference-header-content-length"])
    future = asyncio.get_running_loop().create_future()
    if not waiting:
        asyncio.get_running_loop().call_soon(run_all)
    waiting.append((np.frombuffer(body[start:], np.float32).reshape(1, *row_shape), future))
    outputs = await future
    said = {"name": output_name, "shape": outputs.shape, "datatype": "FP32"}
    head = json.dumps({"outputs": [{**said, "parameters": {"binary_data_size": outputs.nbytes}}]}).encode()
    return head + outputs.tobytes(), len(head)


async def app(scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]], send: Send) -> None:
    headers = []
    if scope["path"] == "/v2/health/ready":
        body = b"{}"
    else:
        body, json_bytes = await infer(scope, receive)
        headers.append((b"inference-header-content-length", b"%d" % json_bytes))
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
