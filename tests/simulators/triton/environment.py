"""NVIDIA's client in a virtual environment of its own below `build/`: its pins are not ours."""

import hashlib
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_BUILD_DIR = _HERE.parents[2] / "build"


def prepare_python() -> Path:
    """Return the interpreter that has tritonclient, installed the first time."""
    pins_path = _HERE / "pins.txt"
    digest = hashlib.sha256(pins_path.read_bytes()).hexdigest()[:12]
    directory = _BUILD_DIR / f"tritonclient-{digest}"
    python, done = directory / "bin" / "python", directory / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", pins_path], check=True)
        done.touch()
    return python
