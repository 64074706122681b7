"""Who answers a batch of raw rows: a version loaded here, or the agent that is running."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edge_agent.client import AgentClient
from edge_agent.errors import RequestError
from edge_agent.samples.fields import FieldRules
from edge_agent.samples.sealing import Array
from models.tensors.spec import TensorSpec

BODY_BYTES = 1024 * 1024  # of one request; the agent takes 4 MiB
_VALUES_MAX = 32 * 1024  # in and out of one batch: below a megabyte of JSON
_ROWS_MAX = 256
_BUSY_WAIT_S = 0.5
_BUSY_TRIES = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The model that answers; the same description gives the same answers."""

    model: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]

    @property
    def batch_rows(self) -> int:
        """Rows of one batch; fixed, since the bits of an answer may depend on the batch that it is in."""
        values = sum(math.prod(spec.row_shape) for spec in (*self.inputs, *self.outputs))
        return min(max(_VALUES_MAX // values, 1), _ROWS_MAX)


class Predictor(Protocol):
    """Answers batches of raw rows."""

    @property
    def description(self) -> Description: ...

    def predict(self, rows: Sequence[Any]) -> Mapping[str, Array]:
        """Return the outputs by name; raises AgentError, whose text begins with `row N: ` where a row is to blame."""
        ...


class LocalPredictor:
    """A version folder, loaded into this process."""

    def __init__(self, directory: Path, rules: FieldRules | None) -> None:
        """Load the version in `directory`; raises StalledError or MalformedError."""
        from edge_agent.inference.model import load_version

        self._model = load_version(directory)
        self._rules = rules
        manifest = self._model.manifest
        self.description = Description(
            model=manifest.model,
            version=f"{manifest.version} {manifest.files[manifest.inference_name].digest[:16]}",
            inputs=manifest.inputs,
            outputs=manifest.outputs,
            labels=manifest.labels,
        )

    def predict(self, rows: Sequence[Any]) -> Mapping[str, Array]:
        from edge_agent.collector import build_model_inputs

        return self._model.infer(build_model_inputs(self._model.manifest, rows, self._rules))


class AgentPredictor:
    """The agent at the other end of `client`, pinned to the version that answers now."""

    def __init__(self, client: AgentClient) -> None:
        """Ask which model that is; raises AgentError."""
        self._client = client
        model = client.get("/v1/status")["model"]
        metadata = client.get(f"/v2/models/{model}")
        version = metadata["versions"][0]
        self._path = f"/v2/models/{model}/versions/{version}/infer"
        self.description = Description(
            model=model,
            version=version,
            inputs=tuple(map(_parse_spec, metadata["inputs"])),
            outputs=tuple(map(_parse_spec, metadata["outputs"])),
            labels=tuple(metadata.get("parameters", {}).get("labels", ())),
        )

    def predict(self, rows: Sequence[Any]) -> Mapping[str, Array]:
        answer = self._post(self._path, {"inputs": build_agent_inputs(self._client, rows)})
        outputs = {output["name"]: output for output in answer["outputs"]}
        return {spec.name: _build_array(outputs[spec.name], spec) for spec in self.description.outputs}

    def _post(self, path: str, document: object) -> Any:
        for _ in range(_BUSY_TRIES):
            try:
                return self._client.post(path, document)
            except RequestError as error:
                if error.status != 429:
                    raise
                time.sleep(_BUSY_WAIT_S)  # others are asking too, and they are not to wait for us
        raise RequestError(f"the agent has been busy for {_BUSY_TRIES * _BUSY_WAIT_S:.0f} s", status=429)


def build_agent_inputs(client: AgentClient, rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Return raw rows as the inputs of a request, as the agent makes them; raises AgentError."""
    parts: list[list[dict[str, Any]]] = []
    first = 0
    try:
        for body, count in build_bodies("rows", rows):
            parts.append(client.post("/v1/rows", body)["inputs"])
            first += count
    except RequestError as error:
        raise RequestError(shift_row(str(error), first), status=error.status) from error
    inputs = parts[0]
    for part in parts[1:]:
        for whole, more in zip(inputs, part, strict=True):
            whole["shape"][0] += more["shape"][0]
            whole["data"] += more["data"]
    return inputs


def build_bodies(name: str, items: Iterable[Any]) -> Iterator[tuple[bytes, int]]:
    """Yield `items` as JSON documents `{name: [...]}` of at most `BODY_BYTES`, if no item alone is longer.

    Returns:
        Each document and how many items it holds.

    Raises:
        RequestError: An item that JSON cannot hold; it is counted from the beginning of its document.
    """
    texts: list[bytes] = []
    size_bytes = 0
    for item in items:
        try:
            text = _dump(item)
        except (TypeError, ValueError) as error:
            raise RequestError(f"row {len(texts)}: {error}") from error
        if texts and size_bytes + len(text) > BODY_BYTES:
            yield _join(name, texts)
            texts, size_bytes = [], 0
        texts.append(text)
        size_bytes += len(text) + 1
    if texts:
        yield _join(name, texts)


def shift_row(message: str, first: int) -> str:
    """Return `message` with the number in `row N: ` counted from `first`."""
    word, _, rest = message.partition(" ")
    number, colon, reason = rest.partition(": ")
    return f"row {first + int(number)}: {reason}" if word == "row" and colon and number.isdecimal() else message


def _dump(item: Any) -> bytes:
    try:
        return json.dumps(item, separators=(",", ":"), allow_nan=False).encode()
    except ValueError:
        return json.dumps(_replace_nan(item), separators=(",", ":"), allow_nan=False).encode()


def _replace_nan(item: Any) -> Any:
    """Return `item` with null for NaN: both say that a value is missing."""
    if isinstance(item, dict):
        return {name: _replace_nan(value) for name, value in item.items()}
    if isinstance(item, list):
        return [_replace_nan(value) for value in item]
    return None if isinstance(item, float) and math.isnan(item) else item


def _join(name: str, texts: Sequence[bytes]) -> tuple[bytes, int]:
    return b'{"%s":[%s]}' % (name.encode(), b",".join(texts)), len(texts)


def _parse_spec(tensor: Mapping[str, Any]) -> TensorSpec:
    dtype = {"BYTES": "string"}.get(tensor["datatype"], tensor["datatype"].replace("FP", "float").lower())
    return TensorSpec(tensor["name"], ("batch", *tensor["shape"][1:]), dtype)


def _build_array(output: Mapping[str, Any], spec: TensorSpec) -> Array:
    data = [math.nan if value is None else value for value in output["data"]]
    return np.array(data, spec.numpy_dtype).reshape(output["shape"])
