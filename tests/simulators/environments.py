"""Virtual environments of their own below `build/`, for programs whose pins are not ours."""

import hashlib
import subprocess
import sys
from pathlib import Path

_BUILD_DIR = Path(__file__).parents[2] / "build"


def prepare_python(name: str, pins_path: Path) -> Path:
    """Return the interpreter of environment `name`, which holds exactly the pins; installed the first time.

    Raises:
        CalledProcessError: It cannot be installed, perhaps for want of a registry.
    """
    digest = hashlib.sha256(pins_path.read_bytes()).hexdigest()[:12]
    directory = _BUILD_DIR / f"{name}-{digest}"
    python, done = directory / "bin" / "python", directory / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", pins_path], check=True)
        done.touch()
    return python
