"""Rounds of the device unit, driven by the real driver: what becomes of a sum, and what a kill may not change.

Each test raises a false alarm at most once in a million runs.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fl_server.errors import RunError
from fl_server.rounds.attempt import Attempt
from fl_server.rounds.driver import Driver
from fl_server.rounds.events import Event
from fl_server.rounds.flower import Reply
from fl_server.rounds.optimizers import ServerOptimizer
from fl_server.rounds.run import (
    RunSpec,
    build_round_dir,
    create_run,
    load_checkpoint,
    load_checkpoints,
    load_cohort,
    load_parameters,
    save_cohort,
)
from fl_server.rounds.spool import UPDATES_NAME, Spool
from fl_server.rounds.words import StoppedError
from models.contract.encoding import build_digest
from models.contract.privacy import PrivacyPlan, TrainingPlan, Unit
from models.tensors.layout import Layout, Vector
from models.tensors.uplink import encode_update
from tests.simulators.crash import crash_points, run_until_crash
from tests.simulators.runs import build_spec

SIZE, BOUND = 10_000, 2.0
LAYOUT = Layout(names=("weight",), shapes=((SIZE,),))
FALSE_ALARM = 1e-6
SLACK = 2.0**-9  # by which noise is larger than claimed, in standard deviations: what rounding may add to an update
NAMES = ("a", "b", "c", "d", "e")


class Devices:
    """Five devices: those of `updates` answer with these bytes, all others have gone away."""

    def __init__(self, updates: Mapping[str, bytes]) -> None:
        self._updates = {NAMES.index(name): update for name, update in updates.items()}
        self._asked: list[int] = []
        self.late: list[Reply] = []  # comes with the replies of the round under way
        self.orders: list[dict[str, Any]] = []  # one of each round

    def list_online(self) -> set[int]:
        return set(range(len(NAMES)))

    def send(self, parameters: Vector, envelopes: Mapping[int, bytes], *, lifetime_s: float) -> None:
        del parameters, lifetime_s
        self._asked = sorted(envelopes)
        self.orders += [json.loads(json.loads(envelopes[node])["payload"]) for node in self._asked[:1]]

    def collect(self) -> Iterator[Reply]:
        yield from self.late
        for node in self._asked:
            yield Reply(node_id=node, update=self._updates.get(node))
        self._asked = []

    def forget(self) -> None:
        pass


class Unattended:
    """Lets a run go on at once."""

    def wait_for_permit(self) -> None:
        pass

    def pause(self, seconds: float) -> None:
        pass

    def take_gone(self) -> list[tuple[str, int]]:
        return []


class StoppedAfter(Unattended):
    """Stops a run before the round after so many."""

    def __init__(self, rounds: int) -> None:
        self._left = rounds

    def wait_for_permit(self) -> None:
        self._left -= 1
        if not self._left:
            raise StoppedError


UNATTENDED = Unattended()


def build_device_spec(directory: Path, *, size: int = SIZE, **changes: object) -> RunSpec:
    key_path = directory / "orders.pem"
    key_path.write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    spec = build_spec(
        layout=Layout(names=("weight",), shapes=((size,),)),
        devices={name: number for number, name in enumerate(NAMES)},
        privacy=PrivacyPlan(
            unit=Unit.DEVICE,
            clipping_norm=Decimal(BOUND),
            noise_multiplier=Decimal("0.3"),
            sampling_rate=Decimal("0.8"),
            delta=Decimal("0.1"),
            epsilon=Decimal(100),
        ),
        training=TrainingPlan(rounds=1, steps=1, expected_batch=Decimal(8), learning_rate=Decimal("0.1")),
        order_key_path=str(key_path),
    )
    return dataclasses.replace(spec, **changes)


def change_privacy(spec: RunSpec, **changes: str) -> RunSpec:
    privacy = dataclasses.replace(spec.privacy, **{name: Decimal(value) for name, value in changes.items()})
    return dataclasses.replace(spec, privacy=privacy)


def change_training(spec: RunSpec, **changes: object) -> RunSpec:
    return dataclasses.replace(spec, training=dataclasses.replace(spec.training, **changes))


def drive(
    run_dir: Path, devices: Devices, *, words: Unattended = UNATTENDED, emit: Callable[[Event], None] | None = None
) -> list[Event]:
    events: list[Event] = []
    Driver(run_dir, words=words, emit=emit or events.append, open_exchange=lambda _spec: nullcontext(devices)).run()
    return events


def run(run_dir: Path, spec: RunSpec, devices: Devices, *, cohorts: Mapping[int, tuple[str, ...]]) -> list[Vector]:
    """Return by what each round moved the parameters, once it was run with these cohorts."""
    create_run(run_dir, spec, np.zeros(spec.layout.size, np.float32))
    for number, cohort in cohorts.items():
        save_cohort(run_dir, number, cohort)
    drive(run_dir, devices)
    rounds = range(spec.training.rounds + 1)
    places = [load_parameters(run_dir, spec.layout, number).astype(np.float64) for number in rounds]
    return [after - before for before, after in pairwise(places)]


def digest_parameters(run_dir: Path, number: int) -> str:
    return build_digest((build_round_dir(run_dir, number) / "parameters.safetensors").read_bytes())


def draw_updates(names: tuple[str, ...], *, norm: float = 0.5 * BOUND) -> dict[str, Vector]:
    vectors = {name: np.random.default_rng(ord(name)).normal(size=SIZE) for name in names}
    return {name: (norm * vector / np.linalg.norm(vector)).astype(np.float32) for name, vector in vectors.items()}


@pytest.mark.parametrize(
    ("cohort", "replying"),
    [(NAMES, "abcde"), (NAMES, "ace"), (("a", "b"), "b"), ((), "")],
    ids=["all of five reply", "three of five reply", "one of two replies", "nobody was drawn"],
)
@pytest.mark.parametrize(
    ("quantile", "noise_multiplier"),
    [(None, 0.3), (Decimal("0.5"), (0.3**-2 - (2 * 4 / 20) ** -2) ** -0.5)],
    ids=["fixed", "adaptive"],
)
def test_noise_on_the_sum_and_its_denominator_are_the_same_however_many_reply(
    tmp_path: Path, cohort: tuple[str, ...], replying: str, quantile: Decimal | None, noise_multiplier: float
) -> None:
    """Chi-square over 10 000 parameters: a standard deviation that is 4 % off is seen nearly always."""
    updates = draw_updates(tuple(replying))
    devices = Devices({name: update.tobytes() for name, update in updates.items()})
    spec = build_device_spec(tmp_path, clipping_quantile=quantile)
    [step] = run(tmp_path / "run", spec, devices, cohorts={1: cohort})
    noise = 4 * step - sum(update.astype(np.float64) for update in updates.values())  # 0.8 of five are expected
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], SIZE)
    assert low < float(((noise / (noise_multiplier * BOUND)) ** 2).sum()) < high * (1 + SLACK) ** 2
    assert abs(stats.pearsonr(noise[1:], noise[:-1]).statistic) < stats.norm.isf(FALSE_ALARM / 2) / SIZE**0.5


def test_two_rounds_have_noise_of_their_own(tmp_path: Path) -> None:
    spec = change_training(build_device_spec(tmp_path), rounds=2)
    first, second = run(tmp_path / "run", spec, Devices({}), cohorts={1: (), 2: ()})
    assert abs(stats.pearsonr(first, second).statistic) < stats.norm.isf(FALSE_ALARM / 2) / SIZE**0.5


def test_round_in_which_nobody_replies_leaves_the_parameters_as_they_were_and_tells_no_count(tmp_path: Path) -> None:
    run_dir, spec = tmp_path / "run", build_device_spec(tmp_path)
    create_run(run_dir, spec, np.full(SIZE, 0.1, np.float32))
    before = (build_round_dir(run_dir, 0) / "parameters.safetensors").read_bytes()
    events: list[Event] = []
    save_cohort(run_dir, 1, ("a", "b", "c"))
    with pytest.raises(RunError, match="abandoned 4 times: fewer updates came than the quorum asks for"):
        drive(run_dir, Devices({}), emit=events.append)
    assert [event.event for event in events] == ["joined"] + ["abandoned"] * 4
    assert not any(character.isdigit() for event in events[1:] for character in event.reason)
    assert load_checkpoint(run_dir) is None
    assert load_cohort(run_dir, 1) == ("a", "b", "c")  # it is drawn once
    assert (build_round_dir(run_dir, 0) / "parameters.safetensors").read_bytes() == before
    assert not (build_round_dir(run_dir, 1) / "parameters.safetensors").exists()


def test_reply_of_a_device_that_was_not_drawn_or_has_replied_counts_for_nothing(tmp_path: Path) -> None:
    updates = draw_updates(("a", "b"))
    devices = Devices({name: update.tobytes() for name, update in updates.items()})
    again, uninvited = (Reply(node_id=NAMES.index(name), update=updates["a"].tobytes()) for name in ("a", "d"))
    devices.late = [again, uninvited, again]
    spec = change_privacy(build_device_spec(tmp_path), noise_multiplier="0")
    [step] = run(tmp_path / "run", spec, devices, cohorts={1: ("a", "b")})
    np.testing.assert_allclose(4 * step, updates["a"].astype(np.float64) + updates["b"], atol=1e-3)


@pytest.mark.parametrize("unit", Unit)
def test_reply_of_a_device_that_was_gone_counts_only_where_the_sum_may_depend_on_how_long_others_take(
    tmp_path: Path, unit: Unit
) -> None:
    spec = build_device_spec(tmp_path) if unit is Unit.DEVICE else build_spec(layout=LAYOUT, devices={"a": 0, "b": 1})
    attempt = Attempt(spec, spec.privacy, 1, tmp_path, cohort={"a": 0, "b": 1})
    attempt.ask(attempt.cohort)
    attempt.gone.add("a")
    refusal = attempt.take(Reply(node_id=0, update=draw_updates(("a",), norm=0.1)["a"].tobytes()))
    assert (attempt.fold.count, refusal is None) == ((0, False) if unit is Unit.DEVICE else (1, True))


@given(
    norm=st.floats(0, 4 * BOUND),
    uplink=st.sampled_from(["float32", "int8"]),
    seed=st.integers(0, 2**32 - 1),
    sparsity=st.sampled_from([0.0, 0.9, 0.99]),
)
def test_no_device_moves_a_sum_by_more_than_the_clipping_norm(norm, uplink, seed, sparsity, tmp_path_factory):
    directory = tmp_path_factory.mktemp("attempt")
    spec = change_training(build_device_spec(directory, size=2000), uplink=uplink)
    attempt = Attempt(spec, spec.privacy, 1, directory, cohort={"a": 0})
    attempt.ask({"a": 0})
    generator = np.random.default_rng(seed)
    update = generator.normal(size=2000) * (generator.random(2000) >= sparsity)
    update = (norm * update / max(np.linalg.norm(update), 1e-9)).astype(np.float32)
    refusal = attempt.take(Reply(node_id=0, update=encode_update(update, uplink, generator)))
    reach = float(np.linalg.norm(attempt.fold.sum))
    assert reach <= BOUND
    if norm <= BOUND:  # as an honest device sends it
        assert refusal is None
        assert reach == pytest.approx(norm, rel=0.2, abs=1e-6)
    elif norm > 2.3 * BOUND:
        assert "L2 norm is above the limit" in refusal.reason


@pytest.mark.parametrize("damage", [np.nan, np.inf, 1e30])
def test_update_that_is_no_vector_of_finite_values_is_refused_and_the_round_goes_on(
    tmp_path: Path, damage: float
) -> None:
    updates = draw_updates(("a", "b"))
    damaged = updates["a"].copy()
    damaged[7] = damage
    replies = {"a": damaged.tobytes(), "b": updates["b"].tobytes(), "c": bytes(4), "d": np.zeros(SIZE, "<f4").tobytes()}
    spec = change_privacy(build_device_spec(tmp_path), noise_multiplier="0")
    run_dir = tmp_path / "run"
    create_run(run_dir, spec, np.zeros(SIZE, np.float32))
    save_cohort(run_dir, 1, ("a", "b", "c", "d"))
    events = drive(run_dir, Devices(replies))
    assert [event.device for event in events if event.event == "update_refused"] == ["a", "c"]
    [completed] = [event for event in events if event.event == "round"]
    assert (completed.accepted, completed.missing) == (("b", "d"), ("a", "c"))
    np.testing.assert_allclose(4 * load_parameters(run_dir, spec.layout, 1), updates["b"], atol=1e-3)


def test_driver_killed_at_any_point_goes_on_with_the_same_cohort_and_publishes_one_noised_sum(tmp_path: Path) -> None:
    ones = np.full(4, 0.5, np.float32)
    replies = {name: (number * ones / 8).astype(np.float32) for number, name in enumerate(NAMES, start=1)}
    for crash_at in crash_points():
        directory = tmp_path / str(crash_at)
        run_dir = directory / "run"
        directory.mkdir()
        spec = change_privacy(build_device_spec(directory, size=4), noise_multiplier="0.001")
        create_run(run_dir, spec, np.zeros(4, np.float32))

        def follow(tell, run_dir=run_dir):
            class Telling(Devices):
                def send(self, parameters, envelopes, **lifetime):
                    super().send(parameters, envelopes, **lifetime)
                    tell(f"asked:{','.join(NAMES[node] for node in envelopes)}")

            def emit(event):
                if event.event == "round":
                    tell(f"published:{','.join(event.accepted)}:{digest_parameters(run_dir, 1)}")

            drive(run_dir, Telling({name: update.tobytes() for name, update in replies.items()}), emit=emit)

        outcome = run_until_crash(follow, crash_at=crash_at)
        again = run_until_crash(follow, crash_at=None)
        told = [word.split(":") for word in (*outcome.told, *again.told)]
        cohort = load_cohort(run_dir, 1)
        for what, names, *_ in told:
            named = set(filter(None, names.split(",")))
            assert named <= set(cohort) if what == "asked" else named == set(cohort)
        # Never another sum for a round whose sum was seen, and it is the one on the disk.
        assert {digest for _, _, *rest in told for digest in rest} == {digest_parameters(run_dir, 1)}
        expected = sum(replies[name] for name in cohort) / 4  # each update once
        np.testing.assert_allclose(load_parameters(run_dir, spec.layout, 1), expected, atol=0.005)  # ten deviations
        if not outcome.crashed:
            break
    assert crash_at > 20


def test_round_whose_updates_are_on_disk_is_completed_without_the_devices_that_are_left(tmp_path: Path) -> None:
    spec = build_device_spec(tmp_path, quorum=4, join_timeout_s=1e-9)
    create_run(tmp_path, spec, np.zeros(SIZE, np.float32))
    save_cohort(tmp_path, 1, NAMES)
    spool = Spool(build_round_dir(tmp_path, 1) / UPDATES_NAME, SIZE)
    for name, update in draw_updates(NAMES[:4]).items():
        spool.add(name, update)
    devices = Devices({})
    devices.list_online = set[int]  # type: ignore[method-assign]
    [completed] = [event for event in drive(tmp_path, devices) if event.event == "round"]
    assert (completed.accepted, completed.missing) == (NAMES[:4], NAMES[4:])


def test_optimizer_goes_on_after_a_restart_as_if_there_had_been_none(tmp_path: Path) -> None:
    devices = Devices({name: update.tobytes() for name, update in draw_updates(NAMES).items()})
    for name, stops in (("whole", ()), ("parted", (2, 2))):
        spec = change_privacy(build_device_spec(tmp_path), noise_multiplier="0")
        optimizer = ServerOptimizer(name="fedyogi", learning_rate=Decimal("0.1"), momentum=Decimal("0.9"))
        spec = dataclasses.replace(change_training(spec, rounds=4), optimizer=optimizer)
        create_run(tmp_path / name, spec, np.zeros(SIZE, np.float32))
        for number in range(1, 5):
            save_cohort(tmp_path / name, number, NAMES[number:])
        for stop in stops:
            with pytest.raises(StoppedError):
                drive(tmp_path / name, devices, words=StoppedAfter(stop))
        drive(tmp_path / name, devices)
    assert digest_parameters(tmp_path / "whole", 4) == digest_parameters(tmp_path / "parted", 4)


def test_clipping_norm_that_follows_a_quantile_is_that_of_the_next_rounds_orders_also_after_a_restart(
    tmp_path: Path,
) -> None:
    spec = build_device_spec(tmp_path, clipping_quantile=Decimal("0.9"))
    spec, run_dir = change_training(spec, rounds=5), tmp_path / "run"
    create_run(run_dir, spec, np.zeros(SIZE, np.float32))
    for number in range(1, 6):
        save_cohort(run_dir, number, NAMES)
    devices = Devices({name: update.tobytes() for name, update in draw_updates(NAMES).items()})
    with pytest.raises(StoppedError):
        drive(run_dir, devices, words=StoppedAfter(3))
    drive(run_dir, devices)
    found = [checkpoint.clipping_norm for checkpoint in load_checkpoints(run_dir)][::-1]
    ordered = [Decimal(order["privacy"]["clipping_norm"]) for order in devices.orders]
    assert ordered == [Decimal(BOUND), *found[:-1]]
    assert len(set(ordered)) == 5
