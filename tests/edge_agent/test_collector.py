"""What the owner did not consent to is not kept; what is kept is what was asked for."""

import dataclasses
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from edge_agent.collector import Collector
from edge_agent.config import AgentSettings, FieldRule, SampleSettings
from edge_agent.errors import RequestError
from models.contract.manifest import ModelManifest
from models.tensors.features import Feature
from tests.simulators.samples import open_device_samples
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
    with open_device_samples(tmp_path) as store:
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


FEATURES = (Feature("age", scale=(50, 10)), Feature("street", impute="", hash=2), Feature("born", one_hot=("1976",)))
RULES = {
    "street": FieldRule(hash=True),
    "name": FieldRule(drop=True),
    "age": FieldRule(step=Decimal(10)),
    "born": FieldRule(period="year"),
}
ROW = {"name": "Ada Raw-Secret", "street": "Raw-Secret Road 7", "age": 47.123456789, "born": "1976-02-03"}


def test_nothing_raw_reaches_the_disk(tmp_path: Path, manifest: ModelManifest) -> None:
    collector = build(tmp_path, dataclasses.replace(manifest, features=FEATURES), consent=True, fields=RULES)
    collector.add([(dict(ROW), np.array(1)), (ROW | {"age": "51.987654321"}, "high")])
    assert collector.remember is not None
    collector.remember("a", collector.build_inputs([ROW]))
    collector.add_feedback("a", 0)
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    collector.keeper.close()
    written += b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for value in (b"Secret", b"1976-", b"47.12", b"51.98"):
        assert value not in written
    for age in (47.123456789, 51.987654321):
        for dtype in ("<f4", "<f8", ">f8"):
            for value in (age, (age - 50) / 10):
                assert np.array(value, dtype).tobytes() not in written
    with open_device_samples(tmp_path) as store:
        assert manifest.training is not None
        x, y = store.load(manifest.inputs[0], manifest.training.target)
    assert x[:, 0].tolist() == [0, 0, 0]
    assert x[:, 3].tolist() == [1, 1, 1]
    assert y.tolist() == [1, 2, 0]


def test_sample_and_request_of_the_same_row_hold_the_same_bits(tmp_path: Path, manifest: ModelManifest) -> None:
    collector = build(tmp_path, dataclasses.replace(manifest, features=FEATURES), fields=RULES)
    asked = collector.build_inputs([ROW])["features"]
    collector.add([(dict(ROW), np.array(1))])
    with open_device_samples(tmp_path) as store:
        assert manifest.training is not None
        x, _ = store.load(manifest.inputs[0], manifest.training.target)
    assert x.tobytes() == asked.tobytes()
    collector.keeper.close()


def test_values_without_names_are_refused_where_names_have_rules(tmp_path: Path, manifest: ModelManifest) -> None:
    collector = build(tmp_path, manifest, fields=RULES)
    with pytest.raises(RequestError, match="names of their columns"):
        collector.add([(np.zeros(4), np.array(1))])
    assert not list(tmp_path.iterdir())


def test_model_without_features_takes_columns_in_their_order(tmp_path: Path, manifest: ModelManifest) -> None:
    collector = build(tmp_path, manifest, fields={"name": FieldRule(drop=True)})
    assert collector.build_inputs([{"a": 1, "name": "x", "b": "2", "c": 3, "d": 4}])["features"].tolist() == [
        [1, 2, 3, 4]
    ]


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (ROW | {"age": "old"}, 0, "row 0: column 'age'"),
        (ROW | {"born": "long ago"}, 0, "row 0: column 'born': expected a date"),
        ({"age": 1}, 0, "column 'born' is missing"),
        (ROW, "huge", "expected one of low, middle, high"),
    ],
)
def test_row_of_no_use_is_refused_and_nothing_of_its_batch_is_kept(
    tmp_path: Path, manifest: ModelManifest, x: dict, y: object, said: str
) -> None:
    collector = build(tmp_path, dataclasses.replace(manifest, features=FEATURES), fields=RULES)
    with pytest.raises(RequestError, match=said) as refused:
        collector.add([(x, y if isinstance(y, str) else np.array(y))])
    assert refused.value.status == 400
    assert not (tmp_path / "samples.db").exists()


def test_columns_and_labels_mean_nothing_before_there_is_a_model(tmp_path: Path) -> None:
    collector = build(tmp_path, None)
    for sample in ((dict(ROW), np.array(1)), (np.zeros(4), "high")):
        with pytest.raises(RequestError, match="no model yet") as refused:
            collector.add([sample])
        assert refused.value.status == 503
    assert collector.add([(np.zeros(4), np.array(1))]) == [1]
    collector.keeper.close()
