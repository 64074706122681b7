import json
import subprocess
from dataclasses import replace
from decimal import Decimal

import pytest
from safetensors.numpy import save_file

from fl_server.__main__ import build_parser
from fl_server.registry.registry import Registry
from models.contract.manifest import build_manifest, parse_manifest
from tests.simulators.federation import BIAS, DEFINITION, SOLUTION, Federation, run_command

COMMANDS = ["init", "run", "enroll", "revoke", "devices", "package", "release", "rollout", "rollback", "train"]


@pytest.fixture
def federation(tmp_path, template):
    with Federation(tmp_path / "federation", template, broker_port=1) as federation:
        yield federation


def assert_refused(done: subprocess.CompletedProcess[str], code: int, text: str) -> None:
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert text in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([command, "--help"])
    assert ended.value.code == 0
    assert f"fl-server {command}" in capsys.readouterr().out


def test_no_command_or_an_unknown_one_is_bad_usage():
    assert run_command().returncode == 2
    assert run_command("dance").returncode == 2


def test_init_enroll_revoke_and_devices(federation):
    done = federation.command("enroll", "device-1", "--out", str(federation.directory / "bundle"))
    assert done.returncode == 0
    assert "device-1" in done.stdout
    [device] = json.loads(federation.command("devices", "--json").stdout)
    assert (device["device"], device["state"], device["trains"]) == ("device-1", "new", False)
    assert federation.command("revoke", "device-1").returncode == 0
    assert "revoked" in federation.command("devices").stdout
    assert_refused(federation.command("revoke", "device-1"), 1, "device-1")


def test_refusals_are_one_line(federation, tmp_path):
    out = str(tmp_path / "bundle")
    assert_refused(run_command("init", str(federation.directory)), 2, "not an empty folder")
    assert_refused(federation.command("enroll", "a/b", "--out", out), 1, "a/b")
    assert federation.command("enroll", "device-1", "--out", out).returncode == 0
    assert_refused(federation.command("enroll", "device-1", "--out", out + "2"), 1, "enrolled already")
    assert_refused(federation.command("enroll", "device-2", "--out", out), 2, "not an empty folder")
    assert_refused(federation.command("release", str(tmp_path)), 2, "manifest.json")
    v1 = str(federation.directory / "v1")
    for arguments, code, said in (
        ((v1, "--weight", "0.1"), 2, "add --challenger"),
        ((v1, "--challenger", "--weight", "1.5"), 2, "weight is 1.5, must be in 0..1"),
        ((v1, "--challenger", "--weight", "0.1", "--shadow"), 2, "not both"),
        (("--promote", "sides", "--challenger"), 2, "about a VERSION_DIR"),
        (("--promote", "sides"), 1, "sides has no challenger"),
        (("--withdraw", "sides"), 1, "sides has no challenger"),
    ):
        assert_refused(federation.command("release", *arguments), code, said)
    assert_refused(federation.command("rollback", "sides"), 1, "sides has no previous; one is there once")
    assert federation.command("rollout").returncode == 2
    plan = tmp_path / "plan.toml"
    plan.write_text("[[abortConfig.criteriaList]]\nthresholdPercentages = 20\n")
    for arguments, code, said in (
        (("start", v1), 1, "sides has no champion; release a version first"),
        (("start", v1, "--waves", "10,some"), 2, "--waves 10,some: expected percentages"),
        (("start", v1, "--plan", str(plan)), 2, "unknown key 'abortConfig.criteriaList.thresholdPercentages'"),
        (("halt", "sides"), 1, "sides is not being rolled out"),
    ):
        assert_refused(federation.command("rollout", *arguments), code, said)
    assert federation.command("release", v1, "--promote", "sides").returncode == 2
    assert federation.command("release").returncode == 2
    assert_refused(federation.command("train", "heart"), 2, "models.heart")
    assert_refused(federation.command("train", "sides", "--epsilon", "0"), 2, "epsilon")
    assert_refused(federation.command("train", "sides", "--rounds", "0"), 2, "rounds")
    assert federation.command("train", "sides", "--epsilon", "much").returncode == 2
    assert_refused(federation.command("train", "sides", "--optimizer", "adam", "--momentum", "0.9"), 2, "0 for adam")
    assert_refused(federation.command("train", "sides", "--proximal-mu", "3"), 2, "proximal_mu")
    assert_refused(federation.command("train", "sides", "--byzantine", "1"), 2, "the mean withstands no hostile device")
    assert_refused(federation.command("train", "sides", "--aggregation", "median"), 2, "at least 1")
    krum = ("--aggregation", "multi-krum", "--byzantine", "1")
    assert_refused(federation.command("train", "sides", *krum), 2, "1 hostile devices of 5 or more, and there are 1")
    assert_refused(federation.command("package", "nothing.py:definition", "--out", out + "3"), 2, "nothing.py")
    assert_refused(run_command("devices", "--config", str(tmp_path / "no.toml")), 2, "no.toml")


def test_version_that_is_worse_on_the_held_out_data_is_not_rolled_out(federation, tmp_path):
    """Whatever its manifest says: the federation's own data decide."""
    v1, right = federation.directory / "v1", tmp_path / "right.safetensors"
    save_file({"weight": SOLUTION.reshape(2, 4), "bias": BIAS}, right)
    definition = f"{federation.directory / 'sides.py'}:definition"
    out = tmp_path / "v2"
    with Registry(federation.directory / "registry") as registry:
        registry.create_model_version(v1)
        packaged = federation.command("package", definition, "--parameters", str(right), "--out", str(out))
        assert packaged.returncode == 0, packaged.stderr
        registry.create_model_version(out)
        registry.set_registered_model_alias("sides", "champion", 2)
    manifest = parse_manifest((v1 / "manifest.json").read_bytes())
    flattered = replace(manifest, version=3, quality=replace(manifest.quality, value=Decimal(1)))
    (v1 / "manifest.json").write_bytes(build_manifest(flattered))
    said = "sides version 3 is not rolled out: accuracy 1.000000 -> 0.000000 on held-out data, worse by 1.000000"
    assert_refused(federation.command("rollout", "start", str(v1)), 1, said)


def test_enrolling_needs_a_model_when_none_is_configured(tmp_path):
    directory = tmp_path / "federation"
    assert run_command("init", str(directory)).returncode == 0
    config = ("--config", str(directory / "fl-server.toml"))
    out = str(tmp_path / "bundle")
    assert_refused(run_command("enroll", "device-1", "--out", out, *config), 2, "--model")
    assert run_command("enroll", "device-1", "--out", out, "--model", "heart", *config).returncode == 0


def test_job_without_a_coordinator_is_queued_and_says_so(federation):
    done = federation.command("release", str(federation.directory / "v1"), "--no-wait")
    assert done.returncode == 0
    assert "queued" in done.stdout
    assert "fl-server run" in done.stderr


def test_packaging_numbers_versions_after_the_registry_and_reuses_the_architecture(federation):
    with Registry(federation.directory / "registry") as registry:
        registry.create_model_version(federation.directory / "v1")
    out = federation.directory / "v2"
    done = federation.command("package", f"{federation.directory / 'sides.py'}:definition", "--out", str(out))
    assert done.returncode == 0, done.stderr
    first = parse_manifest((federation.directory / "v1" / "manifest.json").read_bytes())
    second = parse_manifest((out / "manifest.json").read_bytes())
    assert second.version == 2
    assert second.files["train_step.onnx"] == first.files["train_step.onnx"]
    assert second.quality.samples == 64


@pytest.mark.parametrize("changed", [("labels=", 'local=("weight",),\n    labels='), ('"left"', '"gauche"')])
def test_packaging_a_definition_that_no_longer_fits_the_architecture_is_refused(federation, changed):
    (federation.directory / "sides.py").write_text(DEFINITION.replace(*changed))
    out = str(federation.directory / "v2")
    done = federation.command("package", f"{federation.directory / 'sides.py'}:definition", "--out", out)
    assert_refused(done, 2, "another definition")


def test_packaging_without_a_federation_makes_version_1_without_a_measured_quality(tmp_path):
    (tmp_path / "sides.py").write_text(DEFINITION)
    done = run_command("package", "sides.py:definition", "--out", "v1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no calibration data" in done.stderr
    manifest = parse_manifest((tmp_path / "v1" / "manifest.json").read_bytes())
    assert (manifest.version, manifest.quality) == (1, None)
