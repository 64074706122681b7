import socket
from pathlib import Path

import pytest

from fl_server.config import load_server_settings, resolve_definition
from fl_server.initialise import initialise
from models.contract.settings import SettingsError
from tests.simulators.federation import run_command

GOOD = """
fleet = "demo"
[broker]
host = "10.0.0.1"
[models.digits]
definition = "digits.py:definition"
validation = "validation.npz"
"""


def load(tmp_path: Path, text: str):
    path = tmp_path / "fl-server.toml"
    path.write_text(text)
    return load_server_settings(path)


def test_paths_are_relative_to_the_file_and_defaults_fill_the_rest(tmp_path):
    settings = load(tmp_path, GOOD)
    assert settings.broker.host == "10.0.0.1"
    assert settings.superlink.address == "127.0.0.1:9092"
    assert settings.models["digits"].validation == tmp_path / "validation.npz"
    assert settings.models["digits"].calibration is None
    assert resolve_definition(settings, "digits", tmp_path) == f"{tmp_path}/digits.py:definition"


def test_environment_overrides_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("FL_SERVER_BROKER__PORT", "1999")
    assert load(tmp_path, GOOD).broker.port == 1999


def test_model_without_a_section_is_named_with_those_there_are(tmp_path):
    with pytest.raises(SettingsError, match=r"models\.heart.*digits"):
        resolve_definition(load(tmp_path, GOOD), "heart", tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (GOOD + "colour = 1", "colour"),
        ("[broker]\nport = 1", "fleet"),
        ('fleet = "a/b"', "fleet"),
        ('fleet = "demo"\n[broker]\nport = "1883"', "port"),
        ('fleet = "demo"\n[broker]\nport = 70000', "port"),
        ('fleet = "demo"\n[broker]\nhost = "10.0.0.1"\ntls = false', "broker.tls is false and broker.host '10.0.0.1'"),
        ('fleet = "demo"\n[broker]\ncert_path = "mine.pem"', "belong together"),
        ('fleet = "demo"\n[broker]\nrevocation_interval_s = 60', "revocation_interval_s"),
        ('fleet = "demo"\n[superlink]\nhost = ""', "host"),
        ('fleet = "demo"\n[rounds]\nquorum = 0', "quorum"),
        ('fleet = "demo"\n[rounds]\ndeadline_s = -1', "deadline_s"),
        ('fleet = "demo"\n[rounds]\nidle_timeout_s = 0', "idle_timeout_s"),
        ('fleet = "demo"\n[models."a b"]\ndefinition = "a.py:b"\nvalidation = "v"', "model"),
        ('fleet = "demo"\n[models.a]\ndefinition = "a.py"\nvalidation = "v"', "definition"),
        ('fleet = "demo"\n[models.a]\ndefinition = "a.py:b"', "validation"),
        ("fleet = ", "Invalid value"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, text, named):
    with pytest.raises(SettingsError, match=named):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "flet = 1",
        'fleet = "demo"\n[broker]\nport = "x"',
        'fleet = "demo"\n[broker]\nhost = "broker.example"\ntls = false',
        Path,
    ],
)
def test_run_with_a_bad_configuration_exits_2_with_one_line_that_names_the_file(tmp_path, content):
    path = tmp_path / "fl-server.toml"
    if content is Path:
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    done = run_command("run", "--config", str(path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(path) in done.stderr


def test_run_with_a_file_of_a_model_missing_exits_2_and_names_its_key(tmp_path):
    directory = tmp_path / "federation"
    initialise(directory, fleet="demo", host="127.0.0.1")
    (directory / "digits.py").write_text("")
    with (directory / "fl-server.toml").open("a") as config:
        config.write('[models.digits]\ndefinition = "digits.py:definition"\nvalidation = "validation.npz"\n')
    done = run_command("run", "--config", str(directory / "fl-server.toml"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"models.digits.validation: {directory / 'validation.npz'}" in done.stderr
    assert not (directory / "superlink" / "flwr.db").exists()


def test_run_with_a_taken_port_or_a_missing_certificate_exits_2_before_anything_starts(tmp_path):
    directory = tmp_path / "federation"
    assert run_command("init", str(directory)).returncode == 0
    certificate = (directory / "ca" / "coordinator.pem").read_bytes()
    (directory / "ca" / "coordinator.pem").unlink()
    done = run_command("run", "--config", str(directory / "fl-server.toml"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(directory / "ca" / "coordinator.pem") in done.stderr
    (directory / "ca" / "coordinator.pem").write_bytes(certificate)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_command(
            "run", "--config", str(directory / "fl-server.toml"), environment={"FL_SERVER_SUPERLINK__PORT": port}
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "superlink.port" in done.stderr
    assert port in done.stderr
    assert not (directory / "superlink" / "flwr.db").exists()
