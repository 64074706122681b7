from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.errors import StalledError
from edge_agent.samples.cipher import open_cipher
from edge_agent.training.budget import compute_total
from edge_agent.training.dp_sgd import local_training
from edge_agent.training.ledger import open_ledger
from edge_agent.training.local import LocalParameters
from edge_agent.training.session import TrainingSession
from edge_agent.training.updates import UpdateStore
from models.contract.privacy import Unit
from models.tensors.noise import draw_gaussian, draw_poisson
from models.tensors.uplink import decode_update
from tests.simulators.crash import crash_points, run_until_crash
from tests.simulators.step_graph import build_privacy, build_training, open_onnx_step
from tests.simulators.training import NOW_S, Orders, build_training_job

STEP, MANIFEST = open_onnx_step()
PERSONAL_STEP, PERSONAL_MANIFEST = open_onnx_step(local=True)  # the bias
PARAMETERS = np.array([0.5, -1.0, 2.0, 0.1], np.float32)
SAMPLES = np.ones((20, 3), np.float32), np.zeros(20, np.float32)
SHARED, INITIAL = PARAMETERS[:3], PARAMETERS[3:]
KEY = bytes(32)


class Device:
    """A session on real files; `trained` counts how often training was begun."""

    def __init__(self, directory, orders, *, now_s=NOW_S, failing=False, personal=False, **limits):
        directory.mkdir(exist_ok=True)
        self.step, manifest = (PERSONAL_STEP, PERSONAL_MANIFEST) if personal else (STEP, MANIFEST)
        initial = INITIAL if personal else INITIAL[:0]
        self.local = LocalParameters(directory, manifest, initial, open_cipher(KEY))
        self.job = build_training_job(directory, **limits)
        self.ledger = open_ledger(directory / "ledger.jsonl")
        self.ledger.restore(self.job.ledger_copy, self.job.delta, at=0)
        self.events = []
        self.trained = 0
        self.failing = failing
        self.session = TrainingSession(
            job=self.job,
            graph_digest=MANIFEST.step_digest,
            size=manifest.training.shared.size,
            key=orders.key.public_key(),
            ledger=self.ledger,
            updates=UpdateStore(directory / "updates"),
            local=self.local,
            train=self._train,
            report=self.events.append,
            now_s=lambda: now_s,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ledger.close()

    def handle(self, envelope, parameters=PARAMETERS):
        return self.session.handle(parameters, envelope)

    def _train(self, parameters, privacy, training):
        self.trained += 1
        if self.failing:
            raise StalledError("the samples cannot be read")
        return local_training(self.step, *SAMPLES, parameters, privacy, training, draw_gaussian, draw_poisson)


@pytest.fixture
def orders():
    return Orders(graph_digest=MANIFEST.step_digest)


@pytest.fixture
def device(tmp_path, orders):
    with Device(tmp_path / "device", orders) as device:
        yield device


def test_rounds_are_trained_charged_and_reported(device, orders):
    for number in (1, 2):
        update = device.handle(orders.build(number, PARAMETERS))
        assert np.isfinite(decode_update(update, "float32", size=4)).all()
    assert [(event.event, event.round) for event in device.events] == [("trained", 1), ("trained", 2)]
    entries = device.ledger.entries
    assert [(entry.run, entry.round, entry.steps, entry.order_sequence) for entry in entries] == [
        ("run-1", 1, 2, 1),
        ("run-1", 2, 2, 2),
    ]
    assert device.events[-1].epsilon == str(entries[-1].epsilon_after)


@pytest.mark.parametrize(("uplink", "size_bytes"), [("float32", 16), ("int8", 8)])
def test_retry_gets_the_same_bytes_and_is_not_charged(tmp_path, orders, uplink, size_bytes):
    training = build_training(uplink=uplink)
    envelope = orders.build(1, PARAMETERS, training=training)
    with Device(tmp_path / "device", orders) as device:
        first = device.handle(envelope)
    with Device(tmp_path / "device", orders) as device:  # another process
        again = device.handle(envelope)
        ordered_anew = device.handle(orders.build(1, PARAMETERS, training=training))
        assert (device.trained, len(device.ledger.entries)) == (0, 1)
        assert [event.event for event in device.events] == ["resent", "resent"]
    assert first == again == ordered_anew
    assert len(first) == size_bytes


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"signer": Ed25519PrivateKey.generate()}, "signature"),
        ({"fleet": "other"}, "fleet"),
        ({"audience": "device-2"}, "device-2"),
        ({"expires_at": NOW_S + 1, "issued_at": NOW_S - 60}, "expired"),
        ({"issued_at": NOW_S + 3600, "expires_at": NOW_S + 7200}, "ahead"),
        ({"model": "other"}, "model 'other'"),
        ({"run": "run-2"}, "run 'run-2'"),
        ({"graph_digest": "0" * 64}, "training graph"),
        ({"parameters_digest": "0" * 64}, "parameters"),
    ],
)
def test_order_that_is_not_for_this_is_answered_with_nothing(tmp_path, orders, changed, reason):
    with Device(tmp_path / "device", orders, now_s=NOW_S + 2) as device:
        assert device.handle(orders.build(1, PARAMETERS, **changed)) is None
        [event] = device.events
        assert event.event == "order_refused"
        assert reason in event.message
        assert (device.trained, device.ledger.entries) == (0, ())


@pytest.mark.parametrize("envelope", [b"", b"\xff", b"{}", b"[" * 10_000, b'{"payload":"","signature":""}'])
def test_bytes_that_are_no_envelope_are_answered_with_nothing(device, envelope):
    assert device.handle(envelope) is None
    assert [event.event for event in device.events] == ["order_refused"]
    assert not device.trained


@pytest.mark.parametrize(
    "parameters",
    [
        np.zeros(5, np.float32),
        np.zeros((4, 1), np.float32),
        np.zeros(4, np.float64),
        np.array([0, np.nan, 0, 0], np.float32),
        np.array([0, np.inf, 0, 0], np.float32),
    ],
)
def test_parameters_of_another_shape_or_kind_are_answered_with_nothing(device, orders, parameters):
    assert device.handle(orders.build(1, parameters), parameters) is None
    assert [event.event for event in device.events] == ["order_refused"]
    assert (device.trained, device.ledger.entries) == (0, ())


def test_parameters_exchanged_under_a_genuine_order_are_answered_with_nothing(device, orders):
    assert device.handle(orders.build(1, PARAMETERS), PARAMETERS + 1) is None
    assert "not those of the order" in device.events[0].message


def test_older_order_for_another_round_is_a_replay(device, orders):
    first, second = orders.build(1, PARAMETERS), orders.build(2, PARAMETERS)
    device.handle(first)
    kept = device.handle(second)
    assert device.handle(first) is None
    assert device.events[-1].event == "order_refused"
    assert "replayed" in device.events[-1].message
    assert device.handle(second) == kept
    assert device.trained == 2


def test_replay_is_known_after_the_stored_update_is_gone(tmp_path, orders):
    first, second = orders.build(1, PARAMETERS), orders.build(2, PARAMETERS)
    with Device(tmp_path / "device", orders) as device:
        device.handle(first)
        device.handle(second)
        device.session.updates.remove_other_runs("another")
        assert device.handle(first) is None
        assert device.handle(second) is not None  # may have been lost on its way: spent again
        assert len(device.ledger.entries) == 3


def test_round_beyond_the_owners_budget_is_refused_with_a_reason_and_no_training(tmp_path, orders):
    with Device(tmp_path / "device", orders, epsilon_limit=Decimal(2)) as device:
        number = 0
        while (
            device.handle(orders.build(number := number + 1, PARAMETERS, training=build_training(rounds=1000)))
            is not None
        ):
            assert number < 1000
        assert number > 1
        event = device.events[-1]
        assert (event.event, event.round) == ("refused", number)
        assert "its owner allows 2" in event.message
        assert device.trained == len(device.ledger.entries) == number - 1
        assert Decimal(event.epsilon) == compute_total(device.ledger.entries, Decimal("0.001")) <= 2


def test_plan_with_less_noise_than_the_owner_wants_is_refused(device, orders):
    assert (
        device.handle(orders.build(1, PARAMETERS, privacy=build_privacy(noise_multiplier="0.4", epsilon="99"))) is None
    )
    assert [event.event for event in device.events] == ["refused"]
    assert (device.trained, device.ledger.entries) == (0, ())


def test_update_without_noise_leaves_only_if_the_owner_has_said_that_the_coordinator_is_trusted(tmp_path, orders):
    envelope = orders.build(1, PARAMETERS, privacy=build_privacy(unit=Unit.DEVICE))
    with Device(tmp_path / "device", orders) as device:
        assert device.handle(envelope) is None
        assert "has not set privacy.trust_coordinator" in device.events[0].message
        assert (device.events[0].event, device.trained, device.ledger.entries) == ("refused", 0, ())
    with Device(tmp_path / "device", orders, trusts_coordinator=True) as device:
        assert device.handle(envelope) is not None
    assert list((tmp_path / "device" / "updates").iterdir()) == []  # it is not left lying on the disk
    with Device(tmp_path / "device", orders) as device:  # trusted no more
        assert device.handle(orders.build(1, PARAMETERS, privacy=build_privacy(unit=Unit.DEVICE))) is None


def test_run_of_the_device_unit_is_charged_as_a_whole_and_once(tmp_path, orders):
    privacy, training = build_privacy(unit=Unit.DEVICE, noise_multiplier="1.2"), build_training(rounds=10)
    with Device(tmp_path / "device", orders, trusts_coordinator=True) as device:
        for number in (4, 7):  # as it was drawn
            assert device.handle(orders.build(number, PARAMETERS, privacy=privacy, training=training)) is not None
        second = device.handle(orders.build(8, PARAMETERS, privacy=privacy, training=build_training(rounds=11)))
        assert second is not None
        visible = replace(privacy, participation="visible")
        assert device.handle(orders.build(9, PARAMETERS, privacy=visible, training=training)) is None  # costs too much
        assert device.trained == 3
        entries = device.ledger.entries
        assert [(entry.round, entry.sampling_rate, entry.steps) for entry in entries] == [
            (4, Decimal("0.1"), 10),
            (7, Decimal("0.1"), 0),
            (8, Decimal("0.1"), 11),  # not the run that was paid
        ]
        assert entries[0].epsilon_after == entries[1].epsilon_after < entries[2].epsilon_after
        assert device.ledger.head.spent[0].steps == 21
        replayed = orders.build(4, PARAMETERS, privacy=privacy, training=training, sequence=1)
        assert device.handle(replayed) is None
        assert "replayed" in device.events[-1].message


def test_run_of_the_device_unit_that_its_owner_cannot_afford_is_refused_before_anything_is_computed(tmp_path, orders):
    envelope = orders.build(1, PARAMETERS, privacy=build_privacy(unit=Unit.DEVICE), training=build_training(rounds=900))
    with Device(tmp_path / "device", orders, trusts_coordinator=True, epsilon_limit=Decimal(1)) as device:
        assert device.handle(envelope) is None
        assert "its owner allows 1" in device.events[0].message
        assert (device.trained, device.ledger.entries) == (0, ())


def test_killed_at_any_point_no_update_of_the_device_unit_left_before_its_run_was_paid(tmp_path, orders):
    envelope = orders.build(1, PARAMETERS, privacy=build_privacy(unit=Unit.DEVICE))
    for crash_at in crash_points():
        directory = tmp_path / str(crash_at)

        def answer(tell, directory=directory):
            with Device(directory, orders, trusts_coordinator=True) as device:
                tell(bytes(device.handle(envelope)).hex())

        outcome = run_until_crash(answer, crash_at=crash_at)
        with Device(directory, orders, trusts_coordinator=True) as device:
            steps = [entry.steps for entry in device.ledger.entries]
            assert steps in ([3], []) if not outcome.told else steps == [3]
            assert device.handle(envelope) is not None
            assert [entry.steps for entry in device.ledger.entries] in ([3], [3, 0])  # and never twice
        if not outcome.crashed:
            break
    assert crash_at > 10


def test_numbers_of_a_run_of_the_sample_unit_pay_for_no_run_of_the_device_unit(tmp_path, orders):
    training = build_training(rounds=5, steps=5)
    with Device(tmp_path / "device", orders, trusts_coordinator=True) as device:
        for number, unit in ((1, Unit.SAMPLE), (2, Unit.DEVICE)):
            device.handle(orders.build(number, PARAMETERS, privacy=build_privacy(unit=unit), training=training))
        assert [entry.steps for entry in device.ledger.entries] == [5, 5]


def test_round_that_fails_after_its_spend_stays_charged_and_the_retry_spends_again(tmp_path, orders):
    envelope = orders.build(1, PARAMETERS)
    with Device(tmp_path / "device", orders, failing=True) as device:
        assert device.handle(envelope) is None
        assert (device.events[0].event, len(device.ledger.entries)) == ("refused", 1)
        device.failing = False
        assert device.handle(envelope) is not None
        assert len(device.ledger.entries) == 2


def test_killed_at_any_point_every_distinct_update_that_left_was_charged(tmp_path, orders):
    envelopes = {number: orders.build(number, PARAMETERS) for number in (1, 2)}
    for crash_at in crash_points():
        directory = tmp_path / str(crash_at)

        def answer(tell, directory=directory):
            with Device(directory, orders) as device:
                for envelope in envelopes.values():
                    tell(bytes(device.handle(envelope)).hex())

        outcome = run_until_crash(answer, crash_at=crash_at)
        left = set(outcome.told)
        with Device(directory, orders) as device:  # started again; the coordinator asks again for where it was
            for number in range(min(len(outcome.told) + 1, 2), 3):
                update = device.handle(envelopes[number])
                assert update is not None
                left.add(bytes(update).hex())
            assert 2 <= len(left) <= len(device.ledger.entries)
        if not outcome.crashed:
            break
    assert crash_at > 20


@pytest.mark.parametrize("unit", [Unit.SAMPLE, Unit.DEVICE])
def test_local_parameters_stay_and_a_round_that_is_trained_again_begins_where_it_began(tmp_path, orders, unit):
    privacy = build_privacy(unit=unit)
    directory, begun = tmp_path / "device", []

    def train(parameters, _privacy, _training):
        begun.append(parameters.copy())
        return np.array([0.5, 0, 0, 1], np.float32)

    with Device(directory, orders, personal=True, trusts_coordinator=True) as device:
        device.session = replace(device.session, train=train)
        for number in (1, 2):
            update = device.handle(orders.build(number, SHARED, privacy=privacy), SHARED)
            assert update == np.array([0.5, 0, 0], "<f4").tobytes()
        device.session.updates.remove_other_runs("another")  # the update of round 2 is lost
        assert device.handle(orders.build(2, SHARED, privacy=privacy), SHARED) is not None
        assert device.handle(orders.build(3, SHARED, privacy=privacy), SHARED) is not None
    assert [list(parameters[:3]) for parameters in begun] == [list(SHARED)] * 4
    np.testing.assert_allclose([parameters[3] - INITIAL[0] for parameters in begun], [0, 1, 1, 2], rtol=1e-6)


@pytest.mark.parametrize("unit", [Unit.SAMPLE, Unit.DEVICE])
def test_killed_at_any_point_a_round_moves_local_parameters_once(tmp_path, orders, unit):
    envelope = orders.build(1, SHARED, privacy=build_privacy(unit=unit))
    ones = np.ones(4, np.float32)
    for crash_at in crash_points():
        directory = tmp_path / str(crash_at)

        def answer(tell, directory=directory):
            with Device(directory, orders, personal=True, trusts_coordinator=True) as device:
                device.session = replace(device.session, train=lambda *_: ones)
                tell(bytes(device.handle(envelope, SHARED)).hex())

        outcome = run_until_crash(answer, crash_at=crash_at)
        with Device(directory, orders, personal=True, trusts_coordinator=True) as device:
            device.session = replace(device.session, train=lambda *_: ones)
            assert device.handle(envelope, SHARED) == ones[:3].tobytes()
            assert device.local.begin("run-1", 2, unit) == INITIAL + 1
            assert device.ledger.entries
        if not outcome.crashed:
            break
    assert crash_at > 15
