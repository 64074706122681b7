"""A definition as TFLite graphs, float and int8, made by litert-torch in a process of its own.

litert-torch brings 1.9 GB of libraries, so it may live in another environment (`EDGE_FL_TFLITE_PYTHON`): the
coordinator runs `python -m fl_server.packaging.tflite` there, with a `TfliteJob` on its input and files as answer.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fl_server.errors import DefinitionError, ServerError, UsageError
from fl_server.packaging.definitions import load_definition
from models.contract.encoding import build_json, parse_json
from models.definitions import ModelDefinition

if TYPE_CHECKING:
    from torch import nn

PYTHON_VARIABLE = "EDGE_FL_TFLITE_PYTHON"
FLOAT_NAME, INT8_NAME, OUTPUTS_NAME = "float.tflite", "int8.tflite", "outputs.npy"
CALIBRATION_ROWS = 512  # at most: each is a run of its own, some 5 ms
_TIMEOUT_S = 900.0
_DEFINITION_CODE, _MISSING_CODE = 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TfliteJob:
    """What the process is to do.

    Attributes:
        definition: `FILE.py:NAME` or `package.module:NAME`.
        parameters_path: An npz of arrays by name.
        calibration_path: An npy of inputs, whose extremes set the int8 ranges and on which the module's own outputs
            are told.
        directory: Where the three files go.
    """

    definition: str
    parameters_path: str
    calibration_path: str
    directory: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TfliteExporter:
    """Makes TFLite graphs of one definition.

    Attributes:
        definition: `FILE.py:NAME`, with the file's absolute path, or `package.module:NAME`.
        python: Of an environment with `edge-fl[export-tflite]`.
    """

    definition: str
    python: str

    def export(
        self, parameters: Mapping[str, npt.NDArray[np.float32]], calibration: npt.NDArray[Any], directory: Path
    ) -> npt.NDArray[Any]:
        """Write `FLOAT_NAME` and `INT8_NAME` into `directory`; takes some seconds.

        Returns:
            What the torch module itself answers to the first `CALIBRATION_ROWS` inputs.

        Raises:
            UsageError: litert-torch is not installed there.
            DefinitionError: It cannot convert the module, or the definition is not the one of `parameters`.
            ServerError: The process failed.
        """
        parameters_path, calibration_path = directory / "parameters.npz", directory / "calibration.npy"
        np.savez(parameters_path, **dict(parameters))  # type: ignore[arg-type]  # a stub without arrays by name
        np.save(calibration_path, calibration[:CALIBRATION_ROWS])
        job = TfliteJob(
            definition=self.definition,
            parameters_path=str(parameters_path),
            calibration_path=str(calibration_path),
            directory=str(directory),
        )
        self._run(build_json(job))
        outputs: npt.NDArray[Any] = np.load(directory / OUTPUTS_NAME, allow_pickle=False)
        return outputs

    def _run(self, job: bytes) -> None:
        try:
            done = subprocess.run(
                [self.python, "-m", __name__], input=job, capture_output=True, timeout=_TIMEOUT_S, check=False
            )
        except OSError as error:
            raise UsageError(f"{PYTHON_VARIABLE}: {self.python} cannot be started: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise ServerError(f"the TFLite export did not end within {_TIMEOUT_S:.0f} s") from error
        if done.returncode == 0:
            return
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        if done.returncode == _DEFINITION_CODE:
            raise DefinitionError(lines[-1])
        if done.returncode == _MISSING_CODE:
            raise UsageError(lines[-1])
        raise ServerError(f"the TFLite export ended with code {done.returncode}: {lines[-1]:.300}")


def build_exporter(definition: str) -> TfliteExporter:
    """Return the exporter of `definition`, a reference, with the Python that the environment names, or this one."""
    source, _, name = definition.rpartition(":")
    reference = f"{Path(source).resolve()}:{name}" if source.endswith(".py") else definition
    return TfliteExporter(definition=reference, python=os.environ.get(PYTHON_VARIABLE) or sys.executable)


def main() -> int:
    """Do the job on standard input; the last line on standard error says what went wrong."""
    job = parse_json(sys.stdin.buffer.read(), TfliteJob)
    try:
        _export(job, Path(job.directory))
    except ModuleNotFoundError as error:
        return _fail(
            f"{sys.executable} has no {error.name}: pip install 'edge-fl[export-tflite]', "
            f"or let {PYTHON_VARIABLE} name a Python that has it",
            _MISSING_CODE,
        )
    except DefinitionError as error:
        return _fail(str(error), _DEFINITION_CODE)
    return 0


def _fail(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code


def _export(job: TfliteJob, directory: Path) -> None:
    import torch

    definition = load_definition(job.definition)
    module = definition.build().eval()
    with np.load(job.parameters_path, allow_pickle=False) as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    found = {name: tuple(value.shape) for name, value in module.named_parameters()}
    if found != {name: tuple(value.shape) for name, value in state.items()}:
        raise DefinitionError(f"{job.definition} has other parameters than its exported architecture")
    module.load_state_dict(state, strict=False)
    calibration = np.load(job.calibration_path, allow_pickle=False)
    with torch.no_grad():
        np.save(directory / OUTPUTS_NAME, module(torch.from_numpy(calibration)).numpy())
    _convert(definition, module, calibration[:1], directory / FLOAT_NAME)
    _quantize(definition, directory / FLOAT_NAME, calibration, directory / INT8_NAME)


def _convert(definition: ModelDefinition, module: "nn.Module", row: npt.NDArray[Any], path: Path) -> None:
    """Write `module` for a batch of one row, its tensors named as in the definition; the axes stay where they are."""
    import litert_torch
    import torch
    from torch import Tensor, nn

    (source,), (target,) = definition.inputs, definition.outputs

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
            return {target.name: self.module(inputs[source.name])}

    try:
        converted = litert_torch.convert(Named().eval(), sample_kwargs={source.name: torch.from_numpy(row)})
        converted.export(str(path))
    except Exception as error:  # whatever its many parts raise
        first_line = str(error).strip().partition("\n")[0]
        raise DefinitionError(
            f"{definition.name}: litert-torch cannot convert the module: {type(error).__name__}: {first_line:.200}"
        ) from error


def _quantize(definition: ModelDefinition, float_path: Path, calibration: npt.NDArray[Any], path: Path) -> None:
    """Write the int8 graph; its doors stay as they are.

    The quantizer's own calibration takes a moving average of the ranges and clips what lies beyond, which makes the
    mean error of the logits some ten times larger: each row is calibrated on its own, and the extremes are kept.
    """
    from ai_edge_quantizer import qtyping, quantizer, recipe

    tool = quantizer.Quantizer(str(float_path))
    tool.load_quantization_recipe(recipe.static_wi8_ai8())
    for door in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        tool.update_quantization_recipe(".*", door, algorithm_key="no_quantize")
    (name,) = (spec.name for spec in definition.inputs)
    rows = calibration.astype(np.int32) if calibration.dtype == np.int64 else calibration
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        seen = tool.calibrate({"serving_default": [{name: row[None]}]}, num_threads=1)
        for tensor, ranges in seen.items():
            extremes = merged.setdefault(tensor, dict(ranges))
            if "min" in ranges:
                extremes["min"] = np.minimum(extremes["min"], ranges["min"])
                extremes["max"] = np.maximum(extremes["max"], ranges["max"])
    tool.quantize(merged).export_model(str(path), overwrite=True)


if __name__ == "__main__":
    sys.exit(main())
