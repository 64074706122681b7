"""`fl-server doctor` in a real federation, well and broken."""

import json

import pytest

from fl_server.__main__ import main
from tests.simulators.federation import Federation
from tests.simulators.mosquitto import Mosquitto


@pytest.fixture
def federation(tmp_path, template):
    with Mosquitto(tmp_path) as broker, Federation(tmp_path / "f", template, broker_port=broker.port) as federation:
        yield federation


def examine(federation, capsys, monkeypatch):
    for name, value in federation.environment.items():
        monkeypatch.setenv(name, value)
    code = main(["doctor", "--config", str(federation.config_path), "--json"])
    return code, {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_a_federation_that_is_well_passes(federation, capsys, monkeypatch):
    code, findings = examine(federation, capsys, monkeypatch)
    assert code == 0, findings
    levels = {what: finding["level"] for what, finding in findings.items()}
    assert {what for what, level in levels.items() if level == "warn"} - {"clock"} == {"offline keys", "service"}
    assert {"broker", "database", "model sides", "runtime", "role timestamp", "key superlink.key.pem"} <= set(levels)


def test_each_thing_that_is_broken_is_a_line_with_what_to_do(federation, capsys, monkeypatch):
    (federation.directory / "validation.npz").unlink()
    (federation.directory / "keys" / "online" / "timestamp.pem").unlink()
    (federation.directory / "ca" / "superlink.pem").unlink()
    federation.directory.chmod(0o755)
    federation.environment |= {
        "FL_SERVER_BROKER__PORT": "1",
        "FL_SERVER_PROXY__USED": "true",
        "FL_SERVER_PROXY__PORT": "1",
    }
    code, findings = examine(federation, capsys, monkeypatch)
    failed = {what for what, finding in findings.items() if finding["level"] == "fail"}
    assert code == 1
    assert {"model sides", "role timestamp", "certificate superlink.pem", "permissions", "broker", "proxy"} <= failed
    assert all(findings[what]["advice"] for what in failed)


def test_a_folder_without_a_federation_or_a_bad_configuration_is_the_only_line(tmp_path, capsys):
    path = tmp_path / "fl-server.toml"
    for text, said in (('fleet = "f"\n', "holds no federation"), ("flet = 1\n", "'flet'")):
        path.write_text(text)
        assert main(["doctor", "--config", str(path)]) == 1
        printed = capsys.readouterr().out
        assert (said in printed, printed.count("\n")) == (True, 1)
