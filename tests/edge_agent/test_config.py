"""Configuration is refused in one line that names the file or the key, before anything starts."""

import os
import socket
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from edge_agent.config import load_agent_settings
from models.contract.settings import SettingsError
from tests.simulators.agent import REPOSITORY, find_free_port

GOOD = 'device_id = "d"\nfleet = "f"\nmodel = "m"\nstate_dir = "state"\ntuf_root_path = "root.json"\n'


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "edge-agent.toml"
    path.write_text(text)
    return path


def run_agent(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_agent", "run", "--config", str(path)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_defaults_and_relative_paths(tmp_path: Path) -> None:
    settings = load_agent_settings(write(tmp_path, GOOD))
    assert settings.uds_path == tmp_path / "state" / "agent.sock"
    assert settings.federation is None
    assert settings.privacy.epsilon_limit == Decimal(8)


def test_fields_have_rules_by_name(tmp_path: Path) -> None:
    text = GOOD + "[samples.fields.age]\nstep = 5\n[samples.fields.street]\nhash = true\n"
    fields = load_agent_settings(write(tmp_path, text)).samples.fields
    assert (fields["age"].step, fields["street"].hash) == (Decimal(5), True)


def test_environment_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_AGENT_HTTP__PORT", "9999")
    assert load_agent_settings(write(tmp_path, GOOD)).http.port == 9999


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (GOOD.replace("fleet", "flet"), "flet"),
        (GOOD + "[http]\nprt = 1\n", "http.prt"),
        (GOOD + "[http]\nport = 0\n", "http.port"),
        (GOOD + 'region = "a b"\n', "region"),
        (GOOD + "[http]\nport = 'x'\n", "port"),
        (GOOD + "[broker]\nkeepalive_s = 1\n", "broker.keepalive_s"),
        (GOOD + "[updates]\nwindow = 0\n", "updates.window"),
        (GOOD + "[updates]\ndeadline_s = 0\n", "updates.deadline_s"),
        (GOOD + "[telemetry]\ninterval_s = 0\n", "telemetry.interval_s"),
        (GOOD + "[serving]\nchallenger = 'c'\nweight = 1.5\n", "serving.weight"),
        (GOOD + "[serving]\nchallenger = 'c'\nweight = 0.5\nshadow = true\n", "not both"),
        (GOOD + "[serving]\nshadow = true\n", "serving.challenger"),
        (GOOD + "[privacy]\nepsilon_limit = 'NaN'\n", "privacy.epsilon_limit"),
        (GOOD + "[privacy]\ntotal_epsilon_limit = '0'\n", "privacy.total_epsilon_limit"),
        (GOOD + "[privacy]\ndelta = '1'\n", "privacy.delta"),
        (GOOD + "[privacy]\nnoise_multiplier_limit = '-1'\n", "privacy.noise_multiplier_limit"),
        (GOOD + "[samples]\nkeep_share = 0\n", "samples.keep_share"),
        (GOOD + "[samples]\nfeedback_max = 0\n", "samples.feedback_max"),
        (GOOD + "[samples]\nfeedback_ttl_s = 0\n", "samples.feedback_ttl_s"),
        (GOOD + "[samples]\nmax_count = 0\n", "samples.max_count"),
        (GOOD + "[samples.fields.age]\ndrop = true\nstep = '5'\n", "exactly one of drop, hash, step and period"),
        (GOOD + "[samples.fields.age]\nstep = '0'\n", "samples.fields: step"),
        (GOOD + "[samples.fields.age]\nperiod = 'hour'\n", "period"),
        (GOOD + "[samples.fields.age]\nround = 1\n", "samples.fields.age.round"),
        (GOOD + "[samples]\nmqtt_topic = 'a'\n", "needs samples.consent"),
        (GOOD + "[samples]\nconsent = true\nmqtt_topic = 'a/#'\n", "samples.mqtt_topic"),
        (GOOD + "[samples]\nconsent = true\nmqtt_topic = 'fl/v1/f/offer'\n", "samples.mqtt_topic"),
        (GOOD + "[samples]\nconsent = true\nmqtt_topic = 'a'\n[broker]\nhost = 'b.example'\n", "cross a network"),
        (GOOD + "[federation]\nsuperlink = 'x'\nca_path = 'c'\nnode_key_path = 'k'\n", "federation.superlink"),
        (GOOD + "[federation]\nsuperlink = 'x:1'\n", "node_key_path"),
        (GOOD + "[federation]\nsuperlink = 'x:1'\nnode_key_path = 'k'\n", "needs a section .identity."),
        (GOOD + "[broker]\ntls = true\n", "broker.tls needs a section .identity."),
        (GOOD + "[broker]\nhost = 'b.example'\n", "broker.host"),
        (GOOD.replace('"d"', '"a/b"'), "device_id"),
        (GOOD.replace('"d"', "7"), "device_id"),
        ("device_id = ", "edge-agent.toml"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        load_agent_settings(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "edge-agent.toml"),
        (Path, "edge-agent.toml"),
        (GOOD + "unknown = 1\n", "unknown"),
        (GOOD + "[http]\nport = 'x'\n", "port"),
        (GOOD, "root.json"),
        (GOOD + "[identity]\nca_path = 'ca.pem'\ncert_path = 'device.pem'\nkey_path = 'device.key'\n", "ca.pem"),
    ],
)
def test_command_ends_with_2_and_one_line(tmp_path: Path, text: str | type[Path] | None, named: str) -> None:
    path = tmp_path / "edge-agent.toml"
    if text is Path:
        path.mkdir()
    elif text is not None:
        write(tmp_path, text)
    ended = run_agent(path)
    assert ended.returncode == 2
    assert named in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "state" / "slots").exists()


def test_port_that_is_taken_ends_the_agent_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "root.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_agent(write(tmp_path, f"{GOOD}[http]\nport = {port}\nuds = '{tmp_path / 's'}'\n"))
    assert ended.returncode == 2
    assert f"127.0.0.1:{port}" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert [path.name for path in (tmp_path / "state").iterdir()] == [".lock"]


def test_grpc_port_that_is_taken_ends_the_agent_before_it_answers(tmp_path: Path) -> None:
    (tmp_path / "root.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        http = f"[http]\nport = {find_free_port()}\nuds = '{tmp_path / 's'}'\n"
        ended = run_agent(write(tmp_path, f"{GOOD}{http}[grpc]\nport = {port}\n"))
    assert ended.returncode == 2
    assert f"grpc.port: 127.0.0.1:{port}" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_unix_socket_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "root.json").write_text("{}")
    ended = run_agent(write(tmp_path, f"{GOOD}[http]\nport = 65000\nuds = '{tmp_path / 'no' / 's'}'\n"))
    assert ended.returncode == 2
    assert "http.uds" in ended.stderr


def test_help_is_one_line_a_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "edge_agent", "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for command in ("run", "status", "predict", "ingest", "feedback", "privacy"):
        assert f"\n    {command} " in shown.stdout


def test_unknown_command_is_bad_usage() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "edge_agent", "fly"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
