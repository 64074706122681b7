"""ModelManifest: what one model version is, byte for byte."""

from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal, TypeAlias

import msgspec

from models.contract.encoding import build_canonical, check_digest_text, parse_json
from models.contract.privacy import PrivacyStatement
from models.contract.topics import check_name
from models.tensors.features import Feature, check_features
from models.tensors.layout import Layout
from models.tensors.spec import TRAINING_DTYPES, TensorSpec

MANIFEST_NAME = "manifest.json"
INFERENCE_NAMES = {"onnx": "inference.onnx", "tflite": "inference.tflite"}
TRAIN_STEP_NAME = "train_step.onnx"
EVALUATE_NAME = "evaluate.onnx"
PARAMETERS_NAME = "parameters.safetensors"
GOLDEN_NAME = "golden.bin"
WEIGHTS_NAME = "weights.bin"  # what a graph may have outside itself: its ONNX external data
LOCAL_NAME = "local.f32"  # what local parameters begin with: flat, little-endian float32
FILE_NAMES = frozenset(
    {*INFERENCE_NAMES.values(), WEIGHTS_NAME, TRAIN_STEP_NAME, EVALUATE_NAME, PARAMETERS_NAME, LOCAL_NAME}
)
GRAPH_NAMES = (TRAIN_STEP_NAME, EVALUATE_NAME)  # signed by the offline role: they hold the clipping
FILE_MAX_BYTES = 1 << 30  # 1 GiB; bounds what a manifest can make a device fetch

Runtime: TypeAlias = Literal["onnx", "tflite"]
Precision: TypeAlias = Literal["float32", "int8"]
Preference: TypeAlias = Literal["size", "speed"]
Engine: TypeAlias = Literal["onnx", "opacus"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a version."""

    digest: str
    size_bytes: int

    def __post_init__(self) -> None:
        check_digest_text(self.digest)
        if not 0 < self.size_bytes <= FILE_MAX_BYTES:
            raise ValueError(f"size_bytes is {self.size_bytes}, must be in 1..{FILE_MAX_BYTES}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A short way to a version's weights for a device that holds others, as long and in the same layout.

    Attributes:
        base: Digest of the file that it is added to, another version's of the same name.
        file: The delta itself.
    """

    base: str
    file: FileEntry

    def __post_init__(self) -> None:
        check_digest_text(self.base)

    @property
    def name(self) -> str:
        """File name in the version's folder."""
        return f"from-{self.base}.delta"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingContract:
    """How the graphs of a version are fed.

    Attributes:
        layout: Parameters, in the order in which both graphs take them after (x, y, mask[, clipping_norm]).
        batch: Fixed number of rows of x, y and mask in one run of a graph; >= 1.
        target: Name, shape and dtype of y; float32 or int64.
        metric: Name of the metric computed from the evaluation graph's predictions.
        input_dtype: Of x, where the inference graph takes another one; None where it is the same.
        engine: What clips on the device: "onnx" runs the step graph; "opacus" runs the model's definition, which the
            device must have, because its step has no graph.
        local: Names of the parameters that each device has its own values of, in the order of the layout; what travels
            is the others, flat. Empty for a model that is the same everywhere.
    """

    layout: Layout
    batch: int
    target: TensorSpec
    metric: str
    input_dtype: str | None = None
    engine: Engine = "onnx"
    local: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.layout.select(self.local).names != self.local:
            raise ValueError(f"local {self.local} must be names of the layout, in its order")
        if self.local and self.local == self.layout.names:
            raise ValueError("all parameters are local: nothing would be trained together")
        if self.target.dtype not in ("float32", "int64"):
            raise ValueError(f"target is {self.target.dtype}, must be float32 or int64")
        if self.input_dtype not in (None, *TRAINING_DTYPES):
            raise ValueError(f"input_dtype {self.input_dtype!r} is none of {', '.join(TRAINING_DTYPES)}")
        if not 1 <= self.batch <= 65536:
            raise ValueError(f"batch is {self.batch}, must be in 1..65536")

    @property
    def graph_names(self) -> tuple[str, ...]:
        """File names of the graphs that a device trains and evaluates with."""
        return GRAPH_NAMES if self.engine == "onnx" else (EVALUATE_NAME,)

    @property
    def file_names(self) -> tuple[str, ...]:
        """File names of all that a device needs beside what answers."""
        return (*self.graph_names, LOCAL_NAME) if self.local else self.graph_names

    @property
    def shared(self) -> Layout:
        """Of the parameters that travel between devices and coordinator."""
        return self.layout.select(set(self.layout.names) - set(self.local))

    @property
    def step_name(self) -> str:
        """File name of the graph that says what is trained; train orders name it by its digest."""
        return self.graph_names[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Where a version comes from; empty for one that no run made."""

    parent_version: int | None = None
    run: str | None = None
    round: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What packaging measured on the server's own held-out data."""

    metric: str
    value: Decimal
    samples: int
    float_value: Decimal
    logit_deviation: Decimal  # mean absolute difference between float and packaged outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one graph costs, on one thread of the machine that packaged it; medians, in microseconds."""

    size_bytes: int
    row_us: Decimal  # one run on one row
    batch_us: Decimal  # one run on `Measured.batch` rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Why a version is packaged in its precision: what float32 and int8 cost.

    Attributes:
        packaged: The precision of the inference graph.
        prefer: The definition's wish, by which it was chosen.
        machine: Whose latencies these are, as `uname -m` says.
        batch: Rows of the larger run.
    """

    packaged: Precision
    prefer: Preference
    machine: str
    batch: int
    float32: Figures
    int8: Figures


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelManifest:
    """One immutable model version: its files, its tensors, and what is claimed of it.

    Attributes:
        model: Name of the architecture's model, as in URLs and topics.
        version: Counts up from 1 within the model.
        runtime: Which runtime opens the inference graph.
        files: By file name; a subset of `FILE_NAMES` that holds the runtime's inference graph.
        deltas: Ways to the weights from those that devices ran when the version was packaged.
        golden: What devices must find its graph to answer, `GOLDEN_NAME`; None where packaging had no data.
        training: None for a version that is only served.
        features: How columns of raw rows become the input; none for a model that takes tensors only.
        measured: None for a graph made elsewhere, which is packaged as it is.
    """

    schema_version: Literal[1] = 1
    model: str
    version: int
    runtime: Runtime
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] = ()
    features: tuple[Feature, ...] = ()
    files: dict[str, FileEntry]
    deltas: tuple[Delta, ...] = ()
    golden: FileEntry | None = None
    training: TrainingContract | None = None
    lineage: Lineage = field(default_factory=Lineage)
    privacy: PrivacyStatement | None = None
    quality: Quality | None = None
    measured: Measured | None = None

    def __post_init__(self) -> None:
        check_name(self.model, "model")
        if not 1 <= self.version < 1 << 31:
            raise ValueError(f"version is {self.version}, must be in 1..{(1 << 31) - 1}")
        if not self.inputs or not self.outputs:
            raise ValueError("a model has at least one input and one output")
        for specs in (self.inputs, self.outputs):
            names = [spec.name for spec in specs]
            if len(set(names)) != len(names):
                raise ValueError(f"tensors {names} must have a name each")
        check_features(self.features, self.inputs)
        if unknown := set(self.files) - FILE_NAMES:
            raise ValueError(f"file {min(unknown)!r} is none of {', '.join(sorted(FILE_NAMES))}")
        needed = {INFERENCE_NAMES[self.runtime]}
        if self.training is not None:
            needed |= set(self.training.file_names)
        if missing := needed - set(self.files):
            raise ValueError(f"file {min(missing)!r} is missing")
        self._check_weights()

    @property
    def inference_name(self) -> str:
        """File name of the inference graph."""
        return INFERENCE_NAMES[self.runtime]

    @property
    def weights_name(self) -> str:
        """File name of what the parameters change, to which deltas lead; a TFLite graph is one file with its weights."""
        return WEIGHTS_NAME if self.runtime == "onnx" else self.inference_name

    @property
    def serving_names(self) -> tuple[str, ...]:
        """File names of what answers: the inference graph, and its weights where they lie outside it."""
        return (self.inference_name, WEIGHTS_NAME) if WEIGHTS_NAME in self.files else (self.inference_name,)

    @property
    def all_files(self) -> dict[str, FileEntry]:
        """By file name, `files`, the deltas and the golden samples."""
        golden = {} if self.golden is None else {GOLDEN_NAME: self.golden}
        return self.files | {delta.name: delta.file for delta in self.deltas} | golden

    @property
    def step_digest(self) -> str:
        """Of the graph that says what is trained, as train orders name it."""
        assert self.training is not None
        return self.files[self.training.step_name].digest

    @property
    def training_input(self) -> TensorSpec:
        """What x of the training graphs looks like: the first input, in the dtype that they take."""
        dtype = self.training.input_dtype if self.training is not None else None
        return self.inputs[0] if dtype is None else replace(self.inputs[0], dtype=dtype)

    def _check_weights(self) -> None:
        if WEIGHTS_NAME in self.files and self.runtime != "onnx":
            raise ValueError(
                f"{WEIGHTS_NAME} beside a graph for {self.runtime}: only an ONNX graph has its weights outside"
            )
        weights = self.files.get(self.weights_name)
        if weights is None and self.deltas:
            raise ValueError(f"deltas lead to {self.weights_name}, which is missing")
        bases = [delta.base for delta in self.deltas]
        if len(set(bases)) != len(bases):
            raise ValueError("two deltas have the same base")
        for delta in self.deltas:  # a device holds one at once, and no longer one than the weights
            if weights is not None and delta.file.size_bytes >= weights.size_bytes:
                raise ValueError(
                    f"a delta of {delta.file.size_bytes} bytes leads to {self.weights_name} "
                    f"of {weights.size_bytes} bytes"
                )


def build_manifest(manifest: ModelManifest) -> bytes:
    """Return the canonical bytes whose digest defines the version."""
    document: dict[str, Any] = msgspec.to_builtins(manifest)
    for name in ("features", "deltas", "golden"):  # a version without what is newer is the same bytes as before
        if not document[name]:
            del document[name]
    if manifest.training is not None:
        if manifest.training.engine == "onnx":
            del document["training"]["engine"]
        if not manifest.training.local:
            del document["training"]["local"]
    return build_canonical(document)


def parse_manifest(data: bytes) -> ModelManifest:
    """Return the manifest in `data`; raises MalformedError."""
    return parse_json(data, ModelManifest)
