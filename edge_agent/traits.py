"""What this device is, as far as releases may ask for it."""

import importlib.util
import platform

from edge_agent import __version__
from models.contract.manifest import Runtime
from models.contract.wave import Traits

_PACKAGES: dict[Runtime, tuple[str, ...]] = {
    "onnx": ("onnxruntime",),
    "tflite": ("ai_edge_litert", "tflite_runtime"),
}


def find_traits(region: str) -> Traits:
    """Return what this device is, in the `region` that its owner has configured; no runtime is imported for it."""
    installed = [
        runtime for runtime, packages in _PACKAGES.items() if any(importlib.util.find_spec(name) for name in packages)
    ]
    return Traits(hardware=platform.machine(), runtimes=tuple(installed), agent=__version__, region=region)
