"""What the server says of itself and of its models, as the Open Inference Protocol and Triton's extensions have it; pure."""

from collections.abc import Iterable, Sequence

from edge_agent.http.datatypes import BYTES, DATATYPE_OF
from edge_agent.http.ports import Model, Statistics
from models.contract.manifest import ModelManifest
from models.tensors.spec import TensorSpec

SERVER_NAME = "edge-agent"
EXTENSIONS = ("binary_tensor_data", "statistics", "model_configuration", "model_repository")
_PLATFORMS = {"onnx": "onnxruntime_onnx", "tflite": "litert_tflite"}


def describe_server(version: str) -> dict[str, object]:
    return {"name": SERVER_NAME, "version": version, "extensions": EXTENSIONS}


def describe_model(manifest: ModelManifest, versions: Iterable[str]) -> dict[str, object]:
    """Return name, served versions and tensors of a model; its labels and the columns of its raw rows as parameters."""
    document: dict[str, object] = {
        "name": manifest.model,
        "versions": list(versions),
        "platform": _PLATFORMS[manifest.runtime],
        "inputs": [_describe_tensor(spec) for spec in manifest.inputs],
        "outputs": [_describe_tensor(spec) for spec in manifest.outputs],
    }
    parameters = {"labels": manifest.labels, "columns": [feature.column for feature in manifest.features]}
    if said := {name: values for name, values in parameters.items() if values}:
        document["parameters"] = said
    return document


def describe_config(manifest: ModelManifest, *, max_rows: int) -> dict[str, object]:
    """Return the model's configuration as Triton has it.

    Args:
        manifest: Of the model.
        max_rows: Of one request.
    """
    return {
        "name": manifest.model,
        "platform": _PLATFORMS[manifest.runtime],
        "backend": manifest.runtime,
        "max_batch_size": max_rows,
        "input": [_configure_tensor(spec) for spec in manifest.inputs],
        "output": [_configure_tensor(spec) for spec in manifest.outputs],
    }


def describe_statistics(models: Iterable[Model]) -> dict[str, object]:
    """Return what each version has done since it was loaded."""
    return {"model_stats": [_describe_statistics(model) for model in models]}


def describe_repository(name: str, models: Sequence[Model]) -> list[dict[str, str]]:
    """Return the model's loaded versions; one line that says so if there is none."""
    if not models:
        return [{"name": name, "version": "", "state": "UNAVAILABLE", "reason": "no version is loaded"}]
    return [{"name": name, "version": model.version, "state": "READY", "reason": ""} for model in models]


def _describe_tensor(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": DATATYPE_OF[spec.numpy_dtype], "shape": [-1, *spec.row_shape]}


def _configure_tensor(spec: TensorSpec) -> dict[str, object]:
    datatype = DATATYPE_OF[spec.numpy_dtype]
    data_type = "TYPE_STRING" if datatype == BYTES else f"TYPE_{datatype}"
    return {"name": spec.name, "data_type": data_type, "dims": spec.row_shape or (1,)}


def _describe_statistics(model: Model) -> dict[str, object]:
    counts: Statistics = model.statistics.snapshot()
    return {
        "name": model.manifest.model,
        "version": model.version,
        "last_inference": counts.last_ms,
        "inference_count": counts.rows,
        "execution_count": counts.executions,
        "inference_stats": {
            "success": {"count": counts.requests, "ns": counts.requests_ns},
            "fail": {"count": counts.failures, "ns": counts.failures_ns},
            "queue": _NOTHING,
            "compute_input": _NOTHING,
            "compute_infer": {"count": counts.executions, "ns": counts.executions_ns},
            "compute_output": _NOTHING,
            "cache_hit": _NOTHING,
            "cache_miss": _NOTHING,
        },
        "batch_stats": [],
    }


_NOTHING = {"count": 0, "ns": 0}  # not measured apart: a request runs from its bytes to its answer without a pause
