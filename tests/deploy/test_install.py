"""The install script below a folder of its own: what it makes, again, for another device, and from what it refuses."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy/edge/install.sh"
SITE = next(path for path in sys.path if path.endswith("site-packages"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "device-1")


def write_bundle(path: Path) -> Path:
    path.mkdir()
    (path / "edge-agent.toml").write_text(
        f'device_id = "{path.name}"\nfleet = "f"\nmodel = "m"\nstate_dir = "state"\ntuf_root_path = "root.json"\n'
    )
    (path / "root.json").write_text("{}")
    (path / "node.key").write_text("secret")
    return path


def install(root: Path, wheel: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script; packages that the wheel needs are those of this environment."""
    return subprocess.run(
        ["sh", str(SCRIPT), "--root", str(root), "--source", str(wheel), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def list_files(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.lstat().st_mtime_ns for path in root.rglob("*")}


def test_a_device_is_installed_once_updated_in_place_and_never_becomes_another(
    tmp_path: Path, wheel: Path, bundle: Path
) -> None:
    root, archive = tmp_path / "root", tmp_path / "bundle.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(bundle, arcname=bundle.name)
    done = install(root, wheel, str(archive))
    assert done.returncode == 0, done.stderr
    state, opt = root / "var/lib/edge-fl", root / "opt/edge-fl"
    assert state.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in state.iterdir()} == {"edge-agent.toml", "root.json", "node.key"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in state.iterdir())
    assert (root / "etc/systemd/system/edge-agent.service").read_text() == SCRIPT.with_name(
        "edge-agent.service"
    ).read_text()
    (release,) = (opt / "releases").iterdir()
    assert opt.joinpath("venv").readlink() == Path("/opt/edge-fl/releases") / release.name
    shown = subprocess.run(
        [str(release / "bin/edge-agent"), "doctor", "--config", str(state / "edge-agent.toml")],
        env={**os.environ, "PYTHONPATH": SITE},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.stdout.startswith("ok    configuration"), shown.stderr

    (state / "state").mkdir()
    (release / "complete").write_text("kept")
    before = list_files(release)
    assert install(root, wheel).returncode == 0
    assert list_files(release) == before
    (bundle / "node.key").write_text("renewed")
    assert install(root, wheel, str(bundle)).returncode == 0
    assert ((state / "node.key").read_text(), (state / "state").is_dir()) == ("renewed", True)

    refused = install(root, wheel, str(write_bundle(tmp_path / "device-2")))
    assert (refused.returncode, "this is device device-1" in refused.stderr) == (1, True)
    assert 'device_id = "device-1"' in (state / "edge-agent.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name a bundle"),
        (("nowhere",), "there is no nowhere"),
        (("--extra", "x"), "unknown option"),
        (("--extras",), "needs a value"),
        (("a", "b"), "one bundle"),
        ((str(ROOT / "deploy"),), "holds no edge-agent.toml"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = install(tmp_path / "root", SCRIPT, *arguments)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "root").exists()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not here")
def test_shellcheck_finds_nothing() -> None:
    subprocess.run(["shellcheck", str(SCRIPT), str(ROOT / "deploy/server/fl")], check=True)
