"""What the owner did not consent to is not kept; what is kept is what was asked for."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.collector import Collector
from edge_agent.config import AgentSettings, SampleSettings
from edge_agent.errors import RequestError
from edge_agent.samples.store import open_samples
from models.contract.manifest import ModelManifest
from tests.simulators.tiny_models import save_version

X = {"features": np.arange(4, dtype=np.float32)[None]}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> ModelManifest:
    return save_version(tmp_path_factory.mktemp("version"), trainable=True)


def build(tmp_path: Path, manifest: ModelManifest | None, **samples: object) -> Collector:
    settings = AgentSettings(
        device_id="d",
        fleet="f",
        model="tiny",
        state_dir=tmp_path,
        tuf_root_path=tmp_path / "root.json",
        samples=SampleSettings(**samples),
    )
    return Collector(settings, get_manifest=lambda: manifest)


@pytest.fixture
def collector(tmp_path: Path, manifest: ModelManifest) -> Iterator[Collector]:
    collector = build(tmp_path, manifest, consent=True)
    yield collector
    collector.keeper.close()


def test_without_consent_nothing_is_remembered_and_the_key_is_named(tmp_path: Path, manifest: ModelManifest) -> None:
    collector = build(tmp_path, manifest)
    assert collector.remember is None
    with pytest.raises(RequestError, match=r"consent = true.*\[samples\]") as refused:
        collector.add_feedback("a", 0)
    assert refused.value.status == 403
    assert not list(tmp_path.iterdir())


def test_truth_makes_a_sample_that_training_loads(
    tmp_path: Path, collector: Collector, manifest: ModelManifest
) -> None:
    assert collector.remember is not None
    assert manifest.training is not None
    collector.remember("a", X)
    assert not list(tmp_path.iterdir())  # before the truth came
    assert collector.add_feedback("a", "high") == [1]
    with open_samples(tmp_path / "samples.db") as store:
        x, y = store.load(manifest.inputs[0], manifest.training.target)
    np.testing.assert_array_equal(x, X["features"])
    assert y.tolist() == [2]


def test_request_waits_again_when_there_is_no_room_for_it(tmp_path: Path, manifest: ModelManifest) -> None:
    collector = build(tmp_path, manifest, consent=True, max_count=1)
    assert collector.remember is not None
    for name in "ab":
        collector.remember(name, X)
    collector.add_feedback("a", 0)
    for _ in range(2):
        with pytest.raises(RequestError, match="max_count") as refused:
            collector.add_feedback("b", 0)
        assert refused.value.status == 507
    collector.keeper.close()
