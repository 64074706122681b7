"""What becomes of a round's parameters, without devices: package, gate, register, sign; the broker takes all of it."""

import asyncio
import dataclasses
import errno
import importlib.util
import json
import os
import shutil
from decimal import Decimal

import numpy as np
import pytest

from fl_server.__main__ import main
from fl_server.config import load_server_settings
from fl_server.directory import Directory
from fl_server.errors import ServerError
from fl_server.packaging.tflite import PYTHON_VARIABLE
from fl_server.registry.registry import Registry
from fl_server.release import Releases
from models.contract.manifest import Lineage, build_manifest, parse_manifest
from models.contract.offer import parse_offer
from models.contract.privacy import PrivacyStatement, Unit
from models.contract.topics import build_offer_topic

DEFINITION = """\
from dataclasses import replace

from torch import nn
from models.definitions import ModelDefinition, TensorSpec

definition = ModelDefinition(
    name="wide",
    build=lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2)),
    inputs=(TensorSpec("point", ("batch", 32), "float32"),),
    outputs=(TensorSpec("logits", ("batch", 2), "float32"),),
    loss="cross_entropy",
    metric="accuracy",
    batch=8,
)
strict = replace(definition, logit_tolerance=1e-9)
"""
PRIVACY = PrivacyStatement(
    unit=Unit.SAMPLE,
    epsilon=Decimal(1),
    delta=Decimal("0.001"),
    mechanism="DP-SGD",
    accountant="RDP",
    expected_cohort=1,
    trust_model="protects each record",
)


class Broker:
    """Retains what is published, by topic."""

    def __init__(self):
        self.retained = {}

    async def publish(self, topic, payload, *_, **__):
        self.retained[topic] = payload


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    directory = tmp_path_factory.mktemp("release") / "fed"
    assert main(["init", str(directory)]) == 0
    (directory / "wide.py").write_text(DEFINITION)
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    np.savez(directory / "validation.npz", x=x, y=(x[:, 0] > 0).astype(np.int64))
    with (directory / "fl-server.toml").open("a") as config:
        config.write('\n[models.wide]\ndefinition = "wide.py:definition"\nvalidation = "validation.npz"\n')
    assert package(directory, "definition", directory / "v1") == 0
    asyncio.run(open_releases(directory).release_folder(directory / "v1"))
    return directory


def open_releases(federation, broker=None):
    settings = load_server_settings(federation / "fl-server.toml")
    return Releases(settings, Directory(federation), (broker or Broker()).publish)


def package(federation, name, out_dir):
    config = str(federation / "fl-server.toml")
    return main(["package", f"{federation / 'wide.py'}:{name}", "--config", config, "--out", str(out_dir)])


def consider(federation, round_number, scratch_dir, *, noise, broker=None):
    """Package parameters that tell the classes apart, the worse the more noise they hold."""
    releases = open_releases(federation, broker)
    _, architecture = releases.load_champion("wide")
    generator = np.random.default_rng(round_number)
    parameters = {
        name: generator.normal(0, noise, shape).astype(np.float32)
        for name, shape in zip(architecture.training.layout.names, architecture.training.layout.shapes, strict=True)
    }
    parameters["0.weight"][0, 0], parameters["2.weight"][:, 0] = 3, (-3, 3)
    return asyncio.run(
        releases.consider(
            "wide",
            parameters,
            lineage=Lineage(run="run-1", round=round_number),
            privacy=PRIVACY,
            scratch_dir=scratch_dir,
        )
    )


def test_round_whose_int8_outputs_stray_is_not_released_and_the_next_one_may_be(federation, tmp_path, capsys):
    assert package(federation, "strict", tmp_path / "v2") == 1
    assert "the packaged outputs stray from the module's by 0.0" in capsys.readouterr().err
    verdict = consider(federation, 1, tmp_path / "scratch", noise=0.05)
    assert verdict.version is None
    assert verdict.reason.startswith("wide: the packaged outputs stray from the module's by 0.0")
    assert verdict.value > 0.6, "what it would have been worth"
    assert not (tmp_path / "scratch").exists()

    assert package(federation, "definition", tmp_path / "v3") == 0, "the tolerance is the definition's of today"
    assert consider(federation, 2, tmp_path / "scratch", noise=0.05).version is not None


def test_round_that_moves_the_parameters_little_is_published_as_a_delta_to_the_champion(federation, tmp_path):
    verdict = consider(federation, 3, tmp_path / "scratch", noise=0.01)
    with Registry(Directory(federation).registry_dir) as registry:
        champion = registry.get_model_version("wide", verdict.version)
    manifest = champion.load_manifest()
    (delta,) = manifest.deltas
    assert (champion.directory / delta.name).stat().st_size == delta.file.size_bytes
    assert manifest.golden is not None
    pushed = len(champion.load_manifest_bytes()) + delta.file.size_bytes + manifest.golden.size_bytes
    assert verdict.bytes_pushed == pushed

    broker = Broker()
    assert asyncio.run(open_releases(federation, broker).publish(again=True))
    assert any(f"/blob/{delta.file.digest}/0" in topic for topic in broker.retained)


def test_what_is_offered_has_its_statements_and_is_offered_though_they_cannot_be_written(federation, tmp_path):
    shutil.copytree(federation, copy := tmp_path / "fed")
    directory, broker = Directory(copy), Broker()
    asyncio.run(open_releases(copy).release_folder(copy / "v1"))
    folder = directory.registry_dir / "versions/wide/1"
    (folder / "model.sig").unlink(missing_ok=True)
    assert asyncio.run(open_releases(copy, broker).publish())
    assert {"model.sig", "bom.cdx.json"} <= {path.name for path in folder.iterdir()}
    assert directory.statement_public_key_path.is_file()

    (folder / "model.sig").unlink()
    directory.statement_key_path.write_text("no key")
    assert asyncio.run(open_releases(copy, broker := Broker()).publish())
    assert broker.retained
    assert not (folder / "model.sig").exists()


def test_round_counts_though_it_cannot_be_published_now(federation, tmp_path):
    class FullDisk(Broker):
        async def publish(self, *_, **__):
            raise OSError(errno.ENOSPC, "no space left on device")

    verdict = consider(federation, 3, tmp_path / "scratch", noise=0.01, broker=FullDisk())
    assert verdict.version is not None


def test_damaged_version_keeps_no_other_from_the_fleet(federation, tmp_path):
    shutil.copytree(federation, copy := tmp_path / "fed")
    manifest = parse_manifest((copy / "v1/manifest.json").read_bytes())
    (copy / "v1/manifest.json").write_bytes(build_manifest(dataclasses.replace(manifest, version=9)))
    releases = open_releases(copy, broker := Broker())

    def publish():
        assert asyncio.run(releases.publish(again=True))
        files = parse_offer(broker.retained[build_offer_topic(load_server_settings(copy / "fl-server.toml").fleet)])
        [signed] = [json.loads(data)["signed"] for name, data in files.items() if name.endswith(".releases.json")]
        return signed["targets"]["releases/wide/champion/manifest.json"]["custom"]["version"]

    asyncio.run(releases.release_folder(copy / "v1"))
    assert publish() == 9
    broker.retained.clear()
    (Directory(copy).registry_dir / "versions/wide/9/manifest.json").write_bytes(b"damaged")
    assert publish() == 9
    asyncio.run(releases.promote("wide", 1))
    assert publish() == 1
    for name, version in (("manifest.json", 9), ("inference.onnx", 1)):
        (Directory(copy).registry_dir / f"versions/wide/{version}/{name}").write_bytes(b"damaged")
        with pytest.raises(ServerError, match="restore it"):
            asyncio.run(releases.promote("wide", version))


@pytest.mark.skipif(
    not os.environ.get(PYTHON_VARIABLE) and importlib.util.find_spec("litert_torch") is None,
    reason=f"litert-torch is not installed: pip install 'edge-fl[export-tflite]', or set {PYTHON_VARIABLE}",
)
def test_model_whose_runtime_is_tflite_gets_versions_for_litert(federation, tmp_path):
    config_path = federation / "fl-server.toml"
    config_path.write_text(config_path.read_text() + 'runtime = "tflite"\n')
    assert package(federation, "definition", tmp_path / "v4") == 0
    assert (tmp_path / "v4/inference.tflite").is_file()
    verdict = consider(federation, 4, tmp_path / "scratch", noise=0.0)
    assert verdict.version is not None, verdict.reason
    with Registry(Directory(federation).registry_dir) as registry:
        manifest = registry.get_model_version("wide", verdict.version).load_manifest()
    assert (manifest.runtime, manifest.quality.value) == ("tflite", 1)
