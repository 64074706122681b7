"""Every document on the wire or the disk: its bytes are pinned, and hostile bytes give one named error."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from models.contract.encoding import build_canonical, build_json, parse_json
from models.contract.envelope import RunNotice, TrainOrder, WakeCommand, build_envelope, open_envelope
from models.contract.errors import ContractError, EnvelopeError, MalformedError
from models.contract.floors import TOLD_ROLES, Floor, Floors
from models.contract.ledger import SPENT_MAX, LedgerHead, Spent, add_up, find_missing, take_larger
from models.contract.manifest import (
    WEIGHTS_NAME,
    Delta,
    Figures,
    FileEntry,
    Lineage,
    Measured,
    ModelManifest,
    Quality,
    TrainingContract,
    build_manifest,
    parse_manifest,
)
from models.contract.messages import MESSAGE_MAX_BYTES, Ack, Event, EventKind, Status, Telemetry
from models.contract.offer import build_offer, parse_offer
from models.contract.privacy import PrivacyPlan, PrivacyStatement, TrainingPlan, Unit
from models.contract.terms import ProbationRules, ReleaseTerms, Split, build_terms, parse_terms
from models.contract.topics import parse_device_topic
from models.contract.wave import Requirements, Wave
from models.tensors.features import Feature, Tokens
from models.tensors.layout import Layout
from models.tensors.spec import DTYPES, TensorSpec

GOLDEN_DIR = Path(__file__).parent / "golden"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
NOW_S = 1_800_000_000

PRIVACY = PrivacyPlan(
    unit=Unit.SAMPLE,
    clipping_norm=Decimal("0.5"),
    noise_multiplier=Decimal("1.25"),
    sampling_rate=Decimal("0.1"),
    delta=Decimal("0.001"),
    epsilon=Decimal(8),
)
TRAINING = TrainingPlan(rounds=6, steps=20, expected_batch=Decimal(16), learning_rate=Decimal("0.5"))
HEADER = {"fleet": "demo", "audience": "device-1", "sequence": 7, "issued_at": NOW_S, "expires_at": NOW_S + 60}
FLOORS = Floors(
    roles={role: Floor(version=2**31, keys="d" * 64) for role in TOLD_ROLES},
    signed_at=datetime(2026, 11, 24, tzinfo=UTC),
)
LEDGER = LedgerHead(
    entries=3,
    digest="c" * 64,
    spent=(Spent(model="digits", sampling_rate=Decimal("0.1"), noise_multiplier=Decimal("1.25"), steps=60),),
)
ORDER = TrainOrder(
    **HEADER,
    model="digits",
    graph_digest="a" * 64,
    parameters_digest="b" * 64,
    run="run-1",
    round=2,
    privacy=PRIVACY,
    training=TRAINING,
)
MANIFEST = ModelManifest(
    model="digits",
    version=3,
    runtime="onnx",
    inputs=(TensorSpec("image", ("batch", 1, 8, 8), "float32"),),
    outputs=(TensorSpec("logits", ("batch", 10), "float32"),),
    labels=tuple("0123456789"),
    files={
        name: FileEntry(digest=digit * 64, size_bytes=1000)
        for name, digit in (("inference.onnx", "1"), ("train_step.onnx", "2"), ("evaluate.onnx", "3"))
    },
    training=TrainingContract(
        layout=Layout(names=("f.weight", "f.bias"), shapes=((10, 64), (10,))),
        batch=64,
        target=TensorSpec("y", ("batch",), "int64"),
        metric="accuracy",
    ),
    lineage=Lineage(parent_version=2, run="run-1", round=2),
    privacy=PrivacyStatement(
        unit=Unit.SAMPLE,
        epsilon=Decimal("3.5"),
        delta=Decimal("0.001"),
        mechanism="DP-SGD",
        accountant="RDP",
        expected_cohort=8,
        trust_model="protects each record",
    ),
    quality=Quality(
        metric="accuracy",
        value=Decimal("0.90"),
        samples=200,
        float_value=Decimal("0.91"),
        logit_deviation=Decimal("0.02"),
    ),
    measured=Measured(
        packaged="int8",
        prefer="size",
        machine="x86_64",
        batch=16,
        float32=Figures(size_bytes=3000, row_us=Decimal("8.8"), batch_us=Decimal("40.1")),
        int8=Figures(size_bytes=1000, row_us=Decimal("13.6"), batch_us=Decimal("54.4")),
    ),
)
PERSONAL = replace(
    MANIFEST,
    files=MANIFEST.files | {"local.f32": FileEntry(digest="4" * 64, size_bytes=40)},
    training=replace(MANIFEST.training, local=("f.bias",)),
)
DOCUMENTS: dict[str, tuple[bytes, Callable[[bytes], Any], Any]] = {
    "manifest": (build_manifest(MANIFEST), parse_manifest, MANIFEST),
    "manifest_with_local_parameters": (build_manifest(PERSONAL), parse_manifest, PERSONAL),
    "train_order": (build_canonical(ORDER), lambda data: parse_json(data, TrainOrder), ORDER),
    "status": (
        build_json(status := Status(sent_at=1.5, online=True, agent="0.1.0", model="digits", version=3, slot="a")),
        lambda data: parse_json(data, Status),
        status,
    ),
    "telemetry": (
        build_json(telemetry := Telemetry(id="t1", sent_at=1.5, uptime_s=3.0, rss_mb=80.5, model="digits")),
        lambda data: parse_json(data, Telemetry),
        telemetry,
    ),
    "event": (
        build_json(
            event := Event(
                id="e1", sent_at=1.5, kind=EventKind.PRIVACY_SPENT, message="round 3", round=3, ledger=LEDGER
            )
        ),
        lambda data: parse_json(data, Event),
        event,
    ),
    "ack": (build_json(ack := Ack(ids=("e1", "e2"))), lambda data: parse_json(data, Ack), ack),
    "wake_command": (
        build_canonical(
            wake := WakeCommand(
                **HEADER,
                model="digits",
                run="run-1",
                poll_interval_ms=200,
                idle_timeout_s=60,
                ledger=LEDGER,
                floors=FLOORS,
            )
        ),
        lambda data: parse_json(data, WakeCommand),
        wake,
    ),
    "run_notice": (
        build_canonical(
            notice := RunNotice(
                **{**HEADER, "audience": "*"},
                model="digits",
                run="run-1",
                state="open",
                privacy=PRIVACY,
                training=TRAINING,
            )
        ),
        lambda data: parse_json(data, RunNotice),
        notice,
    ),
    "wave_terms": (
        build_canonical(
            build_terms(
                waves := ReleaseTerms(
                    role="champion",
                    version=4,
                    requirements=Requirements(hardware=("aarch64",), agent="1.2"),
                    wave=Wave(key="digits-4", percentage=Decimal("12.5"), devices=("kitchen",)),
                    probation=ProbationRules(seconds=600, min_agreement=Decimal("0.95"), max_latency_ratio=Decimal(2)),
                )
            )
        ),
        lambda data: parse_terms(parse_json(data, Any)),
        waves,
    ),
    "release_terms": (
        build_canonical(
            build_terms(
                terms := ReleaseTerms(role="challenger", version=4, split=Split(weight=Decimal("0.1"), shadow=False))
            )
        ),
        lambda data: parse_terms(parse_json(data, Any)),
        terms,
    ),
}
PARSERS = [parse for _, parse, _ in DOCUMENTS.values()] + [
    parse_offer,
    lambda data: open_envelope(data, TrainOrder, key=KEY.public_key(), fleet="demo", audience="device-1", now_s=NOW_S),
    lambda data: parse_device_topic("demo", data.decode(errors="replace")),
]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_bytes_of_a_document_are_pinned_by_its_golden_file(name: str) -> None:
    data, parse, document = DOCUMENTS[name]
    golden = (GOLDEN_DIR / f"{name}.json").read_bytes().rstrip(b"\n")
    assert data == golden
    assert parse(golden) == document


@pytest.mark.parametrize("name", DOCUMENTS)
def test_fields_added_later_are_ignored_and_another_schema_is_refused(name: str) -> None:
    data, parse, document = DOCUMENTS[name]
    fields = json.loads(data)
    assert parse(json.dumps(fields | {"added_later": 1}).encode()) == document
    with pytest.raises(MalformedError):
        parse(json.dumps(fields | {"schema_version": 2}).encode())


@pytest.mark.parametrize("parse", PARSERS)
@given(data=st.binary(max_size=300) | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(build_json))
def test_hostile_bytes_give_a_contract_error(parse: Callable[[bytes], Any], data: bytes) -> None:
    with pytest.raises(ContractError):
        parse(data)


@pytest.mark.parametrize("name", DOCUMENTS)
@given(data=st.data())
def test_a_field_of_another_kind_gives_a_contract_error_or_a_valid_document(name: str, data: st.DataObject) -> None:
    raw, parse, document = DOCUMENTS[name]
    fields = json.loads(raw)
    key = data.draw(st.sampled_from(sorted(fields)))
    junk = st.sampled_from([None, [], {}, "", "../x", -1, 1e30, "NaN", "Infinity", True, [None], "\0", 10**400])
    fields[key] = data.draw(junk)
    with contextlib.suppress(ContractError):
        assert isinstance(parse(json.dumps(fields).encode()), type(document))


def test_deeply_nested_and_oversized_documents_are_malformed() -> None:
    for data in (b"[" * 60_000, b'{"a":' * 10_000, b" " * 70_000 + b"{}"):
        with pytest.raises(MalformedError):
            parse_manifest(data)


def test_an_offer_carries_its_files_and_refuses_bombs_and_strange_names() -> None:
    files = {"1.root.json": b"{}", "timestamp.json": b'{"a": 1}'}
    assert parse_offer(build_offer(files)) == files
    with pytest.raises(ValueError, match="at most"):
        build_offer({"timestamp.json": b" " * 300_000})
    bomb = zstandard.ZstdCompressor(level=1).compress(b" " * 50_000_000)
    assert len(bomb) < 10_000
    with pytest.raises(MalformedError):
        parse_offer(bomb)
    named = zstandard.compress(b'{"schema_version":1,"metadata":{"../../etc/passwd":"x"}}')
    with pytest.raises(MalformedError, match="no name"):
        parse_offer(named)


@pytest.mark.parametrize("name", ["version", "round"])
@pytest.mark.parametrize("number", [-1, 2**31, 2**63, 10**400])
def test_number_of_an_event_that_no_database_holds_is_malformed(name: str, number: int) -> None:
    fields = json.loads(DOCUMENTS["event"][0]) | {name: number}
    with pytest.raises(MalformedError):
        parse_json(json.dumps(fields).encode(), Event)


def test_terms_without_a_role_are_those_of_an_earlier_release_and_a_split_is_a_challengers() -> None:
    assert parse_terms({"version": 3}) == ReleaseTerms(version=3)
    assert build_terms(ReleaseTerms(role="champion", version=3)) == {
        "schema_version": 1,
        "role": "champion",
        "version": 3,
    }
    split = {"weight": "0.1", "shadow": False}
    for custom, reason in (
        ({"version": 3, "role": "challenger"}, "has a split"),
        ({"version": 3, "role": "champion", "split": split}, "only a challenger"),
        ({"version": 3, "role": "challenger", "split": split | {"shadow": True}}, "not both"),
        ({"version": 3, "role": "challenger", "split": {"weight": "1.5"}}, "must be in 0..1"),
        ({"version": 3, "role": "challenger", "split": {"weight": "NaN"}}, "must be in 0..1"),
        ({"version": 3, "role": "previous", "wave": {"key": "a", "percentage": "10"}}, "only a champion"),
        ({"version": 3, "role": "champion", "wave": {"key": "a", "percentage": "101"}}, r"must be in 0\.\.100"),
        ({"version": 3, "role": "champion", "probation": {"min_agreement": "0.9"}}, "it needs seconds"),
        ({"version": 3, "role": "champion", "probation": {"max_latency_ratio": "0.5"}}, "must be >= 1"),
        (None, "object"),
    ):
        with pytest.raises(MalformedError, match=reason):
            parse_terms(custom)


def test_signed_documents_hold_no_floats() -> None:
    with pytest.raises(ValueError, match="float"):
        build_canonical({"epsilon": 1.5})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fleet": "other"}, "fleet"),
        ({"audience": "device-2"}, "device-2"),
        ({"issued_at": NOW_S - 90, "expires_at": NOW_S - 30}, "expired"),
        ({"issued_at": NOW_S + 400, "expires_at": NOW_S + 500}, "ahead"),
    ],
)
def test_an_order_that_is_stale_or_for_somebody_else_is_refused(change: dict[str, Any], reason: str) -> None:
    envelope = build_envelope(dataclasses.replace(ORDER, **change), KEY)
    with pytest.raises(EnvelopeError, match=reason):
        open_order(envelope)


def test_a_genuine_order_opens_and_a_forged_or_altered_one_does_not() -> None:
    envelope = build_envelope(ORDER, KEY)
    assert open_order(envelope) == ORDER
    with pytest.raises(EnvelopeError, match="signature"):
        open_order(build_envelope(ORDER, Ed25519PrivateKey.generate()))
    with pytest.raises(EnvelopeError, match="signature"):
        open_order(envelope.replace(b"run-1", b"run-2"))
    wake = WakeCommand(**HEADER, model="digits", run="run-1", poll_interval_ms=200, idle_timeout_s=60)
    with pytest.raises(MalformedError):
        open_order(build_envelope(wake, KEY))


def open_order(envelope: bytes) -> TrainOrder:
    return open_envelope(envelope, TrainOrder, key=KEY.public_key(), fleet="demo", audience="device-1", now_s=NOW_S + 1)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"optimizer": "lion"}, "sgd or adam"),
        ({"optimizer": "adam", "momentum": Decimal("0.9")}, "must be 0 for adam"),
        ({"proximal_mu": Decimal("-0.1")}, "proximal_mu is -0.1"),
        ({"proximal_mu": Decimal("2.1")}, "1 / learning_rate"),
        ({"proximal_mu": Decimal("Infinity")}, "not finite"),
    ],
)
def test_optimizer_settings_out_of_range_are_refused_in_words(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(TRAINING, **changed)


def test_plan_written_before_there_was_a_choice_of_optimizer_is_read_as_it_was_meant() -> None:
    written = b'{"expected_batch":"16","learning_rate":"0.5","momentum":"0","rounds":6,"steps":20}'
    assert parse_json(written, TrainingPlan) == TRAINING


def test_training_takes_its_input_in_the_dtype_of_its_own_graphs() -> None:
    assert MANIFEST.training_input == MANIFEST.inputs[0]
    assert MANIFEST.training is not None
    tokens = dataclasses.replace(
        MANIFEST,
        inputs=(TensorSpec("tokens", ("batch", 7), "int32"),),
        training=dataclasses.replace(MANIFEST.training, input_dtype="int64"),
    )
    assert tokens.training_input == TensorSpec("tokens", ("batch", 7), "int64")
    assert parse_manifest(build_manifest(tokens)) == tokens


def test_version_may_take_and_give_several_tensors_of_any_served_dtype() -> None:
    inputs = tuple(TensorSpec(f"in_{dtype}", ("batch", 2), dtype) for dtype in DTYPES)
    outputs = (TensorSpec("label", ("batch",), "string"), TensorSpec("probabilities", ("batch", 2), "float16"))
    served = dataclasses.replace(MANIFEST, inputs=inputs, outputs=outputs, training=None, quality=None, measured=None)
    assert parse_manifest(build_manifest(served)) == served
    assert [spec.numpy_dtype.name for spec in outputs] == ["object", "float16"]


def test_tensors_that_share_a_name_and_targets_that_no_graph_learns_are_refused() -> None:
    with pytest.raises(ValueError, match="must have a name each"):
        dataclasses.replace(MANIFEST, outputs=(*MANIFEST.outputs, *MANIFEST.outputs))
    assert MANIFEST.training is not None
    with pytest.raises(ValueError, match="target is string, must be float32 or int64"):
        dataclasses.replace(MANIFEST.training, target=TensorSpec("y", ("batch",), "string"))


def test_features_travel_in_the_manifest_and_leave_one_without_them_as_it_was() -> None:
    features = (
        Feature("age", impute=54, clip=(0, 120), scale=(54.5, 9)),
        Feature("pain", one_hot=("none", "typical")),
        Feature("note", tokenise=Tokens(length=3, words=("no", "pain"))),
    )
    inputs = (TensorSpec("x", ("batch", 6), "int64"),)
    manifest = dataclasses.replace(MANIFEST, inputs=inputs, features=features)
    assert parse_manifest(build_manifest(manifest)).features == features
    assert b"54.5" in build_manifest(manifest)
    assert b"features" not in build_manifest(MANIFEST)
    with pytest.raises(ValueError, match="features fill one input"):
        dataclasses.replace(MANIFEST, features=features)


def test_weights_and_the_deltas_that_lead_to_them_travel_in_the_manifest_and_leave_one_without_them_as_it_was() -> None:
    files = MANIFEST.files | {WEIGHTS_NAME: FileEntry(digest="4" * 64, size_bytes=1000)}
    delta = Delta(base="5" * 64, file=FileEntry(digest="6" * 64, size_bytes=300))
    split = dataclasses.replace(MANIFEST, files=files, deltas=(delta,))
    assert parse_manifest(build_manifest(split)) == split
    assert split.serving_names == ("inference.onnx", WEIGHTS_NAME)
    assert split.all_files == files | {f"from-{'5' * 64}.delta": delta.file}
    assert b"deltas" not in build_manifest(MANIFEST)
    assert MANIFEST.serving_names == ("inference.onnx",)

    for changes, said in (
        ({"files": MANIFEST.files}, "deltas lead to weights.bin, which is missing"),
        ({"deltas": (delta, dataclasses.replace(delta, file=MANIFEST.files["inference.onnx"]))}, "the same base"),
        ({"deltas": (dataclasses.replace(delta, file=files[WEIGHTS_NAME]),)}, "a delta of 1000 bytes"),
        (
            {"runtime": "tflite", "training": None, "files": {"inference.tflite": delta.file, **files}},
            "only an ONNX graph has its weights outside",
        ),
        (
            {"runtime": "tflite", "training": None, "files": {"inference.tflite": delta.file}},
            "a delta of 300 bytes leads to inference.tflite of 300 bytes",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(split, **changes)


KINDS = st.lists(
    st.builds(
        Spent,
        model=st.sampled_from(["a", "b"]),
        sampling_rate=st.sampled_from([Decimal("0.1"), Decimal("0.10"), Decimal(1)]),
        noise_multiplier=st.sampled_from([Decimal(1), Decimal("2.50")]),
        steps=st.integers(1, 100),
    ),
    max_size=8,
).map(add_up)


@given(first=KINDS, second=KINDS)
def test_of_two_ledgers_the_larger_spend_wins_and_what_is_missing_makes_it_up(first: Any, second: Any) -> None:
    larger = take_larger(first, second)
    assert larger == take_larger(second, first) == take_larger(larger, first)
    assert find_missing(first, larger) == find_missing(second, larger) == ()
    assert add_up([*first, *find_missing(larger, first)]) == larger


def test_ledgers_that_list_a_kind_twice_or_too_many_or_impossible_ones_are_refused() -> None:
    (kind,) = LEDGER.spent
    with pytest.raises(ValueError, match="each once"):
        LedgerHead(spent=(kind, replace(kind, steps=2)))
    with pytest.raises(ValueError, match="at most 64"):
        LedgerHead(spent=tuple(replace(kind, noise_multiplier=Decimal(z)) for z in range(1, SPENT_MAX + 2)))
    for impossible in ({"steps": 0}, {"noise_multiplier": Decimal(0)}, {"sampling_rate": Decimal(2)}, {"model": "a/b"}):
        with pytest.raises(ValueError, match=next(iter(impossible))):
            replace(kind, **impossible)


def test_the_largest_ledger_fits_into_a_command() -> None:
    spent = tuple(
        Spent(
            model="m" * 64,
            sampling_rate=Decimal("0.123456789012"),
            noise_multiplier=Decimal(z) + Decimal("0.123456789012"),
            steps=10**9,
        )
        for z in range(SPENT_MAX)
    )
    wake = WakeCommand(
        **HEADER,
        model="m" * 64,
        run="r" * 64,
        poll_interval_ms=200,
        idle_timeout_s=60,
        ledger=LedgerHead(spent=spent),
        floors=FLOORS,
    )
    assert len(build_envelope(wake, KEY)) <= MESSAGE_MAX_BYTES
