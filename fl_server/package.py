"""`fl-server package`: a version from a definition or from a graph made elsewhere, with or without a federation."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fl_server.directory import Directory
from fl_server.errors import DefinitionError, UsageError
from fl_server.evaluation.answers import measure_answers
from fl_server.evaluation.evaluate import measure_quality
from fl_server.held_out import HeldOutData, load_held_out, load_named_data
from fl_server.packaging.architecture import Architecture, load_architecture, load_parameters, update_wishes
from fl_server.packaging.imported import Run, load_imported, package_imported
from fl_server.packaging.package import Tools, package_version
from fl_server.packaging.tflite import TfliteExporter
from fl_server.registry.registry import Registry
from fl_server.release import find_released
from models.contract.manifest import Lineage, ModelManifest, Quality
from models.contract.topics import check_name
from models.definitions import ModelDefinition
from models.tensors.spec import TensorSpec

_MADE_UP_ROWS = 256

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The server's own data, npz files.

    Attributes:
        calibration_path: x, for the quantization ranges; else the validation data's, else made up.
        validation_path: x and y, to measure the version on; else the calibration data, if it has y.
    """

    calibration_path: Path | None = None
    validation_path: Path | None = None


def package_definition(
    definition: ModelDefinition,
    *,
    directory: Directory | None,
    parameters_path: Path | None,
    data: Data,
    tflite: TfliteExporter | None,
    out_dir: Path,
    say: Say,
) -> ModelManifest:
    """Write a version of `definition` to the new folder `out_dir`.

    Args:
        definition: Exported first, unless the federation has its architecture already.
        directory: The federation that numbers the version and keeps the architecture; None for neither.
        parameters_path: Safetensors; None for the untrained module's.
        data: What sets the quantization ranges, and what the version is measured on.
        tflite: Exports `definition`; None packages it for onnxruntime.
        out_dir: Must not exist, or be empty.
        say: Is told what takes long and what was assumed.

    Raises:
        ServerError: What cannot be used, and why.
    """
    _clear_place(out_dir)
    load = partial(load_held_out, spec=definition.inputs[0], features=definition.features)
    calibration = load(data.calibration_path) if data.calibration_path else None
    validation = load(data.validation_path) if data.validation_path else calibration
    ranges = calibration or validation
    if ranges is None:
        say(
            "no calibration data: the quantization ranges come from made-up inputs; a trained model needs --calibration"
        )
    with tempfile.TemporaryDirectory() as scratch:
        parent = directory.architectures_dir if directory else Path(scratch)
        architecture = _load_or_export(definition, parent / definition.name, say)
        return package_version(
            architecture,
            parameters=(
                load_parameters(parameters_path, architecture.training.layout)
                if parameters_path
                else architecture.load_initial_parameters()
            ),
            version=_get_next_version(directory, definition.name),
            calibration=_make_up_inputs(definition.inputs[0]) if ranges is None else ranges.x,
            tools=Tools(
                measure=_build_measure(definition, validation),
                tflite=tflite,
                running=_list_running(directory, definition.name),
            ),
            lineage=Lineage(),
            privacy=None,
            out_dir=out_dir,
        )


def package_file(
    path: Path,
    *,
    model: str,
    labels: tuple[str, ...],
    directory: Directory | None,
    data: Data,
    out_dir: Path,
    say: Say,
) -> ModelManifest:
    """Write a version that is only served, from an ONNX or TFLite file, to the new folder `out_dir`.

    Args:
        path: Made elsewhere; its tensors are read from it.
        model: The name it is served under.
        labels: Names of the classes; may be empty.
        directory: The federation that numbers the version; None for none.
        data: What a float graph is quantized on, and what the version is measured on; without, neither is done.
        out_dir: Must not exist, or be empty.
        say: Is told what was decided.

    Raises:
        ServerError: What cannot be served or used, and why.
    """
    try:
        check_name(model, "model")
    except ValueError as error:
        raise UsageError(str(error)) from error
    imported = load_imported(path)
    calibration = load_named_data(data.calibration_path, imported.inputs) if data.calibration_path else None
    validation = load_named_data(data.validation_path, imported.inputs) if data.validation_path else calibration
    _clear_place(out_dir)

    def measure(run: Run) -> Quality | None:
        if validation is None or validation.y is None:
            return None
        try:
            return measure_answers(run(validation.inputs), validation.y, labels)
        except ValueError as error:
            raise UsageError(f"{data.validation_path or data.calibration_path}: {error}") from error

    return package_imported(
        imported,
        model=model,
        version=_get_next_version(directory, model),
        labels=labels,
        calibration=calibration.inputs if calibration else None,
        measure=measure,
        out_dir=out_dir,
        say=say,
    )


def _clear_place(out_dir: Path) -> None:
    if out_dir.is_dir() and not any(out_dir.iterdir()):
        out_dir.rmdir()
    if out_dir.exists():
        raise UsageError(f"{out_dir} is not an empty folder; a version gets one of its own")
    out_dir.parent.mkdir(parents=True, exist_ok=True)


def _load_or_export(definition: ModelDefinition, directory: Path, say: Say) -> Architecture:
    if not directory.exists():
        from fl_server.packaging.export import export_architecture  # torch, which a known architecture does not need

        say(f"exporting {definition.name}; once, it takes some seconds")
        return export_architecture(definition, directory)
    architecture = load_architecture(directory)
    training = architecture.training
    try:
        local = definition.find_local(training.layout.names)
    except ValueError as error:
        raise DefinitionError(f"{definition.name}: {error}") from error
    asked = (definition.inputs, definition.outputs, definition.labels, definition.batch, local)
    if (architecture.inputs, architecture.outputs, architecture.labels, training.batch, training.local) != asked:
        raise UsageError(
            f"{directory} was exported from another definition of {definition.name!r}; "
            "remove that folder, or give the new definition a name of its own"
        )
    needs = "; it trains with the Opacus engine" if training.engine == "opacus" else ""
    say(f"using the architecture in {directory}{needs}; remove it if the definition has changed")
    return update_wishes(architecture, definition)


def _get_next_version(directory: Directory | None, model: str) -> int:
    if directory is None:
        return 1
    with Registry(directory.registry_dir) as registry:
        return registry.get_next_version(model)


def _list_running(directory: Directory | None, model: str) -> list[Path]:
    if directory is None:
        return []
    with Registry(directory.registry_dir) as registry:
        return [version.directory for version in find_released(registry, model).values()]


def _build_measure(definition: ModelDefinition, data: HeldOutData | None) -> Callable[[Path, Path], Quality | None]:
    if data is None or data.y is None:
        return lambda _inference_path, _float_path: None
    x, y = data.x, data.y
    return lambda inference_path, float_path: measure_quality(inference_path, float_path, x, y, definition.metric)


def _make_up_inputs(spec: TensorSpec) -> npt.NDArray[Any]:
    shape = (_MADE_UP_ROWS, *spec.row_shape)
    if spec.dtype.startswith("float"):
        return np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)
    return np.zeros(shape, spec.dtype)  # the one integer that indexes any table
