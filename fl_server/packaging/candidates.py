"""The float and the int8 graph of a new version, of which one is packaged; int8 by the champion's template if it fits."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx

from fl_server.errors import UsageError
from fl_server.inference import open_graph, run_batches
from fl_server.packaging.architecture import Architecture
from fl_server.packaging.graphs import build_with_parameters, load_graph, save_graph
from fl_server.packaging.precision import compute_deviation
from fl_server.packaging.quantize import prepare_graph, quantize
from fl_server.packaging.template import (
    MisfitError,
    build_weights,
    explain_renewal,
    measure_activation_clipping,
    split_weights,
)
from fl_server.packaging.tflite import CALIBRATION_ROWS, FLOAT_NAME, INT8_NAME
from models.contract.encoding import build_digest
from models.contract.manifest import EVALUATE_NAME, MANIFEST_NAME, WEIGHTS_NAME, Precision, parse_manifest
from models.definitions.definition import DEFAULT_LOGIT_TOLERANCE

logger = logging.getLogger(__name__)

_SAME = 1e-3  # between torch and onnxruntime, relative to the largest output

Array = npt.NDArray[Any]


class Exporter(Protocol):
    """What makes TFLite graphs, `FLOAT_NAME` and `INT8_NAME` in a folder; returns the torch module's own outputs."""

    def export(
        self, parameters: Mapping[str, npt.NDArray[np.float32]], calibration: Array, directory: Path
    ) -> Array: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidates:
    """Two graphs of the same parameters; what the module itself answers to the first calibration inputs.

    Attributes:
        float32_path, int8_path: In the runtime's format; an ONNX graph in int8 may have its weights beside it.
        exact_path: The float graph in ONNX.
        outputs: The module's.
    """

    float32_path: Path
    int8_path: Path
    exact_path: Path
    outputs: Array

    def get_path(self, precision: Precision) -> Path:
        return self.int8_path if precision == "int8" else self.float32_path


def build_candidates(
    architecture: Architecture,
    parameters: Mapping[str, npt.NDArray[np.float32]],
    calibration: Array,
    *,
    tflite: Exporter | None,
    champion_dir: Path | None,
    directory: Path,
) -> Candidates:
    """Write both graphs into `directory`; arguments as those of `package_version`.

    Args:
        architecture: Of `parameters`.
        parameters: By name.
        calibration: Inputs.
        tflite: Makes the graphs for LiteRT; None makes them for onnxruntime.
        champion_dir: Folder of the version whose template is kept if it fits; None keeps none.
        directory: Empty.
    """
    exact_path = directory / "float.onnx"
    graph = build_with_parameters(load_graph(architecture.float_path), parameters)
    save_graph(graph, exact_path)
    checked = calibration[:CALIBRATION_ROWS]
    outputs = run_graph(architecture, exact_path, checked)
    if tflite is None:
        int8_path = directory / "int8" / "int8.onnx"  # in a folder of its own: its weights lie beside it
        int8_path.parent.mkdir()
        if champion_dir is None or not _keep_template(
            architecture, graph, calibration, outputs, champion_dir, int8_path
        ):
            _build_template(architecture, graph, calibration, int8_path)
        return Candidates(float32_path=exact_path, int8_path=int8_path, exact_path=exact_path, outputs=outputs)
    exact = tflite.export(parameters, checked, directory)
    if exact.shape != outputs.shape or not np.allclose(
        exact, outputs, rtol=0, atol=_SAME * max(1.0, float(np.abs(outputs).max()))
    ):
        raise UsageError(f"{architecture.model}: the definition no longer is the one that was exported; export it anew")
    return Candidates(
        float32_path=directory / FLOAT_NAME, int8_path=directory / INT8_NAME, exact_path=exact_path, outputs=exact
    )


def run_graph(architecture: Architecture, path: Path, inputs: Array) -> Array:
    """Return what the graph at `path` answers."""
    outputs = run_batches(open_graph(path), {architecture.inputs[0].name: inputs})
    return outputs[architecture.outputs[0].name]


def _build_template(architecture: Architecture, graph: onnx.ModelProto, calibration: Array, path: Path) -> None:
    """Write the float `graph` in int8, with scales of its own: the template to `path`, the weights beside it."""
    quantize(graph, calibration, architecture.quantization, path)
    template, weights = split_weights(load_graph(path), prepare_graph(graph, architecture.quantization))
    if weights:  # a model of scalars has none that can lie outside
        save_graph(template, path)
        path.with_name(WEIGHTS_NAME).write_bytes(weights)


def _keep_template(
    architecture: Architecture,
    graph: onnx.ModelProto,
    calibration: Array,
    outputs: Array,
    champion_dir: Path,
    path: Path,
) -> bool:
    """Write the float `graph` in int8 by the champion's template, as `_build_template`; return whether that will do."""
    champion = parse_manifest((champion_dir / MANIFEST_NAME).read_bytes())
    evaluate = champion.files.get(EVALUATE_NAME)  # of the same architecture's, or the template is another's
    if WEIGHTS_NAME not in champion.files or evaluate is None:
        return False
    if evaluate.digest != build_digest(architecture.evaluate_path.read_bytes()):
        return False
    shutil.copyfile(champion_dir / champion.inference_name, path)
    template, prepared = load_graph(path), prepare_graph(graph, architecture.quantization)
    try:
        weights, clipped = build_weights(template, prepared)
        path.with_name(WEIGHTS_NAME).write_bytes(weights)
        reason = explain_renewal(
            weight_clipping=clipped,
            activation_clipping=measure_activation_clipping(template, prepared, calibration),
            deviation=compute_deviation(run_graph(architecture, path, calibration[: len(outputs)]), outputs),
            # A definition that tolerates anything may still gain from scales of its own.
            tolerance=architecture.logit_tolerance or DEFAULT_LOGIT_TOLERANCE,
        )
    except MisfitError as error:
        reason = str(error)
    if reason:
        logger.info("%s gets scales of its own: %s", architecture.model, reason)
    return not reason
