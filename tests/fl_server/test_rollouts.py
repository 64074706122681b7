"""Rollouts over a real registry, repository and database; the broker takes all of it, and time is told."""

import asyncio
import dataclasses
import json
import shutil
from decimal import Decimal

import pytest

from fl_server.config import load_server_settings
from fl_server.directory import Directory
from fl_server.errors import ServerError
from fl_server.fleet.roster import Roster
from fl_server.registry.registry import Registry, RegistryError
from fl_server.release import Releases
from fl_server.rollout.plan import LatencyRule, RolloutPlan
from fl_server.rollout.records import RolloutRecords
from fl_server.rollout.waves import Phase, RolloutError, roll_back
from fl_server.rollouts import Rollouts
from models.contract.manifest import Lineage, build_manifest, parse_manifest
from models.contract.messages import Event, EventKind, Status, Telemetry
from models.contract.offer import parse_offer
from models.contract.privacy import PrivacyStatement, Unit
from models.contract.terms import ProbationRules, Split
from models.contract.wave import Requirements, Traits
from tests.simulators.federation import BIAS, MODEL, SOLUTION

CANARY_FIRST = RolloutPlan(waves=(Decimal(0), Decimal(100)), devices=("canary",))
DEVICES = ("canary", "kitchen", "shed")


class Coordinator:
    """What a coordinator does with rollouts; opened anew it is one that was killed and started again."""

    def __init__(self, path, clock):
        self.directory, self.offers = Directory(path), []
        settings = load_server_settings(self.directory.config_path)
        self.roster, self.records = Roster(self.directory.database_path), RolloutRecords(self.directory.database_path)
        self.releases = Releases(settings, self.directory, self._publish)
        self.rollouts = Rollouts(self.directory, self.records, self.roster, self.releases, lambda: clock[0])

    async def _publish(self, topic, payload, *_, **__):
        if topic.endswith("/offer"):
            self.offers.append(payload)

    def advance(self):
        """Let the coordinator look at what was reported; return whether it told the fleet something new."""
        before = len(self.offers)
        asyncio.run(self.rollouts.advance())
        return len(self.offers) > before

    def start(self, version_dir, plan):
        return asyncio.run(self.rollouts.start(version_dir, plan))

    def read_terms(self):
        """Return the terms that the offer signs now, by role."""
        asyncio.run(self.releases.publish(again=True))
        files = parse_offer(self.offers[-1])
        [releases] = [json.loads(data) for name, data in files.items() if name.endswith(".releases.json")]
        terms = [target["custom"] for target in releases["signed"]["targets"].values() if "custom" in target]
        return {each["role"]: each for each in terms}

    def read_versions(self):
        return {role: terms["version"] for role, terms in self.read_terms().items()}

    def say(self, device, kind, *, version=2, message="it is too slow"):
        number = self.roster.find_last_event()
        event = Event(id=f"{number}", sent_at=1, kind=kind, message=message, model=MODEL, version=version)
        self.roster.save_event(device, event)

    @property
    def phase(self):
        return self.records.find(MODEL).phase


@pytest.fixture
def clock():
    return [1000.0]


@pytest.fixture
def path(tmp_path, template, clock):
    shutil.copytree(template, path := tmp_path / "federation")
    for number in (2, 3):
        write_version(path, number)
    with Roster(path / "coordinator.db") as roster:
        for device in DEVICES:
            with roster.enrolling(device, b"key"):
                pass
    asyncio.run(Coordinator(path, clock).releases.release_folder(path / "v1"))
    return path


@pytest.fixture
def coordinator(path, clock):
    return Coordinator(path, clock)


def write_version(path, number):
    shutil.copytree(path / "v1", directory := path / f"v{number}")
    manifest = parse_manifest((directory / "manifest.json").read_bytes())
    (directory / "manifest.json").write_bytes(build_manifest(dataclasses.replace(manifest, version=number)))


def test_canary_that_fails_takes_the_fleet_back_and_the_version_is_released_no_more(coordinator, path, clock):
    probation = ProbationRules(seconds=60, max_latency_ratio=Decimal(2))
    status = coordinator.start(path / "v2", dataclasses.replace(CANARY_FIRST, probation=probation))
    assert (status.phase, status.awaits_approval, status.percentage) == (Phase.ROLLING, True, 0)
    terms = coordinator.read_terms()
    assert terms["champion"]["version"] == 2
    assert terms["champion"]["wave"]["devices"] == ["canary"]
    assert terms["champion"]["wave"]["percentage"] == "0"
    assert terms["champion"]["probation"]["seconds"] == 60
    assert terms["previous"] == {"schema_version": 1, "role": "previous", "version": 1}
    coordinator.say("canary", EventKind.DOWNLOADED)
    assert not coordinator.advance()
    coordinator.say("canary", EventKind.FAILED)
    coordinator = Coordinator(path, clock)  # killed with the event on disk: it still counts
    assert coordinator.advance()
    assert coordinator.read_terms() == {"champion": {"schema_version": 1, "role": "champion", "version": 1}}
    assert coordinator.phase is Phase.ROLLED_BACK
    assert coordinator.records.find(MODEL).reason == "1 of 1 devices failed, 20 % of at least 1 end it"
    assert not coordinator.advance()
    assert not Coordinator(path, clock).advance()


def test_device_that_failed_and_then_updated_counts_by_its_last_word_and_a_repeated_event_not_at_all(coordinator, path):
    coordinator.start(path / "v2", CANARY_FIRST)
    failed = Event(id="f", sent_at=1, kind=EventKind.FAILED, message="no", model=MODEL, version=2)
    assert coordinator.roster.save_event("canary", failed)
    coordinator.say("canary", EventKind.UPDATED)
    assert not coordinator.roster.save_event("canary", failed)
    for number in (1, 3):
        coordinator.say("shed", EventKind.FAILED, version=number)
    assert not coordinator.advance()
    assert coordinator.phase is Phase.ROLLING


def test_halted_rollout_is_for_nobody_new_and_goes_on_without_the_failures_before(coordinator, path):
    coordinator.start(path / "v2", CANARY_FIRST)
    asyncio.run(coordinator.rollouts.halt(MODEL, 2))
    assert asyncio.run(coordinator.rollouts.halt(MODEL, 2)).phase is Phase.HALTED, "as a job does that is resumed"
    wave = coordinator.read_terms()["champion"]["wave"]
    assert (wave["percentage"], wave["devices"]) == ("0", [])
    with pytest.raises(RolloutError, match="is halted: there is no wave to approve"):
        asyncio.run(coordinator.rollouts.approve(MODEL, 2, 1))
    coordinator.say("canary", EventKind.FAILED)
    asyncio.run(coordinator.rollouts.resume(MODEL, 2))
    assert not coordinator.advance()
    assert coordinator.read_terms()["champion"]["wave"]["devices"] == ["canary"]
    status = asyncio.run(coordinator.rollouts.approve(MODEL, 2, 1))
    assert asyncio.run(coordinator.rollouts.approve(MODEL, 2, 1)) == status
    assert status.phase is Phase.DONE
    assert "wave" not in coordinator.read_terms()["champion"]
    coordinator.say("shed", EventKind.FAILED)
    assert coordinator.advance(), "what is reported when all have it still counts"
    assert coordinator.read_versions() == {"champion": 1}


def test_wave_grows_once_a_minute_by_its_rate_and_a_restart_neither_widens_nor_forgets_it(coordinator, path, clock):
    coordinator.start(path / "v2", RolloutPlan(maximumPerMinute=1))
    first = coordinator.read_terms()["champion"]["wave"]
    assert 0 < Decimal(first["percentage"]) < 100
    assert not coordinator.advance()
    clock[0] += 3600  # without a coordinator
    coordinator = Coordinator(path, clock)
    assert coordinator.read_terms()["champion"]["wave"] == first
    assert coordinator.advance()
    second = coordinator.read_terms()["champion"]["wave"]
    assert (second["key"], Decimal(second["percentage"]) > Decimal(first["percentage"])) == (first["key"], True)
    assert not coordinator.advance()
    clock[0] += 60
    assert coordinator.advance()
    assert coordinator.phase is Phase.DONE
    assert "wave" not in coordinator.read_terms()["champion"]


def test_kill_between_the_end_of_a_rollout_and_its_aliases_offers_the_version_to_nobody_and_is_made_good(
    coordinator, path, clock
):
    coordinator.start(path / "v2", RolloutPlan(maximumPerMinute=1))
    coordinator.records.save(roll_back(coordinator.records.find(MODEL), "it is too slow"))
    coordinator = Coordinator(path, clock)
    terms = coordinator.read_terms()["champion"]
    assert (terms["version"], terms["wave"]["percentage"]) == (2, "0")
    assert coordinator.advance()
    assert coordinator.read_versions() == {"champion": 1}


def test_nothing_else_is_released_while_a_rollout_is_under_way_and_a_rollback_ends_it(coordinator, path):
    coordinator.start(path / "v2", CANARY_FIRST)
    key = coordinator.records.find(MODEL).key
    assert coordinator.start(path / "v2", CANARY_FIRST).phase is Phase.ROLLING, "as a job does that is resumed"
    assert coordinator.records.find(MODEL).key == key
    releases = coordinator.releases
    for released in (
        lambda: releases.release_folder(path / "v3"),
        lambda: releases.release_folder(path / "v3", Split(shadow=True)),
        lambda: releases.promote(MODEL, 1),
        lambda: coordinator.rollouts.start(path / "v3", CANARY_FIRST),
    ):
        with pytest.raises(
            ServerError, match="the rollout of sides version 2 is rolling at 0 %: let it come to its end"
        ):
            asyncio.run(released())
    assert asyncio.run(coordinator.rollouts.roll_back(MODEL, 2)).version == 1
    assert asyncio.run(coordinator.rollouts.roll_back(MODEL, 2)).version == 1, "as a job does that is resumed"
    assert coordinator.read_versions() == {"champion": 1}
    with pytest.raises(RolloutError, match="version 1 is the champion already"):
        coordinator.start(path / "v1", CANARY_FIRST)
    with pytest.raises(RolloutError, match="sides version 3 is not being rolled out"):
        asyncio.run(coordinator.rollouts.halt(MODEL, 3))
    asyncio.run(releases.release_folder(path / "v2"))
    assert "wave" not in coordinator.read_terms()["champion"], "released to everybody, whatever became of its rollout"
    coordinator.say("shed", EventKind.FAILED)
    assert not coordinator.advance()
    assert coordinator.read_versions() == {"champion": 2, "previous": 1}
    coordinator.start(path / "v3", CANARY_FIRST)
    asyncio.run(coordinator.rollouts.roll_back(MODEL, 3))
    assert coordinator.read_versions() == {"champion": 2, "previous": 1}, "as it was before the rollout"
    assert asyncio.run(coordinator.rollouts.roll_back(MODEL, 2)).version == 1
    assert coordinator.read_versions() == {"champion": 1, "previous": 2}


def test_rolled_back_version_does_not_become_the_previous_one_where_a_kill_left_it_champion(coordinator, path):
    coordinator.start(path / "v2", CANARY_FIRST)
    coordinator.records.save(roll_back(coordinator.records.find(MODEL), "it is too slow"))
    asyncio.run(coordinator.releases.release_folder(path / "v3"))
    assert coordinator.read_versions() == {"champion": 3, "previous": 1}
    coordinator.start(path / "v2", CANARY_FIRST)
    coordinator.records.save(roll_back(coordinator.records.find(MODEL), "it is too slow"))
    assert asyncio.run(coordinator.rollouts.roll_back(MODEL, 2)).version == 3
    assert coordinator.read_versions() == {"champion": 3, "previous": 1}


def test_rollout_of_a_version_that_is_not_the_champion_is_not_steered_and_a_rollback_ends_it(coordinator, path):
    coordinator.start(path / "v2", CANARY_FIRST)
    asyncio.run(coordinator.rollouts.halt(MODEL, 2))
    coordinator.releases.register(path / "v3")
    with Registry(coordinator.directory.registry_dir) as registry:
        registry.set_registered_model_alias(MODEL, "champion", 3)
    with pytest.raises(RolloutError, match="version 3 is the champion"):
        asyncio.run(coordinator.rollouts.resume(MODEL, 2))
    assert asyncio.run(coordinator.rollouts.roll_back(MODEL, 3)).version == 3
    assert coordinator.phase is Phase.ROLLED_BACK
    assert asyncio.run(coordinator.releases.promote(MODEL, 1)).version == 1


def test_device_without_the_runtime_ends_nothing(coordinator, path):
    coordinator.start(path / "v2", CANARY_FIRST)
    traits = Traits(hardware="x86_64", runtimes=("tflite",), agent="0.1")
    coordinator.roster.save_status("shed", Status(sent_at=1, online=True, agent="0.1", model=MODEL, traits=traits))
    coordinator.say("shed", EventKind.FAILED, message="it is for onnx, installed here is tflite")
    assert not coordinator.advance()


def test_first_version_cannot_come_in_waves(coordinator, path):
    with Registry(coordinator.directory.registry_dir) as registry:
        registry.delete_registered_model_alias(MODEL, "champion", version=1)
    with pytest.raises(RegistryError, match="sides has no champion; release a version first"):
        coordinator.start(path / "v2", CANARY_FIRST)


def test_done_rollout_gives_way_to_the_next_version(coordinator, path):
    coordinator.start(path / "v2", RolloutPlan())
    assert coordinator.start(path / "v2", RolloutPlan()).phase is Phase.DONE, "as a job does that is resumed"
    asyncio.run(coordinator.releases.release_folder(path / "v3"))
    coordinator.say("shed", EventKind.FAILED)
    assert not coordinator.advance()
    assert coordinator.read_versions() == {"champion": 3, "previous": 2}


def test_slow_version_takes_the_fleet_back(coordinator, path):
    rule = LatencyRule(max_ratio=Decimal(2), min_devices=1)

    def measure(device, version, latency_ms):
        telemetry = Telemetry(
            id="t", sent_at=1, uptime_s=1, rss_mb=1, model=MODEL, version=version, latency_p50_ms=latency_ms
        )
        coordinator.roster.save_telemetry(device, telemetry)

    for device in ("kitchen", "shed"):
        measure(device, 1, 2.0)
    measure("canary", 2, 10.0)
    coordinator.start(path / "v2", dataclasses.replace(CANARY_FIRST, latency=rule))
    assert not coordinator.advance(), "that was measured before"
    measure("canary", 2, 3.5)
    assert not coordinator.advance()
    measure("canary", 2, 10.0)
    assert coordinator.advance()
    assert coordinator.read_versions() == {"champion": 1}
    assert "take 10 ms, those on the version before 2 ms" in coordinator.records.find(MODEL).reason


def test_requirements_are_signed_as_long_as_the_version_is_released_and_others_refusals_end_nothing(coordinator, path):
    requirements = Requirements(hardware=("aarch64",))
    coordinator.start(path / "v2", RolloutPlan(requirements=requirements))
    traits = Traits(hardware="x86_64", runtimes=("onnx",), agent="0.1")
    for device in ("kitchen", "shed"):
        status = Status(sent_at=1, online=True, agent="0.1", model=MODEL, traits=traits)
        coordinator.roster.save_status(device, status)
        coordinator.say(device, EventKind.FAILED, message="it is for hardware aarch64")
    assert not coordinator.advance()
    signed = {"hardware": ["aarch64"], "agent": "", "regions": []}
    assert coordinator.read_terms()["champion"]["requirements"] == signed
    coordinator.start(path / "v3", CANARY_FIRST)
    terms = coordinator.read_terms()
    assert (terms["previous"]["requirements"], "requirements" in terms["champion"]) == (signed, False)
    asyncio.run(coordinator.rollouts.roll_back(MODEL, 3))
    assert coordinator.read_terms()["champion"]["requirements"] == signed
    coordinator.say("canary", EventKind.FAILED, version=2)
    assert not coordinator.advance(), "that rollout was over when the next one began"


def test_round_of_a_run_is_not_released_beside_a_rollout(coordinator, path):
    def consider(number):
        parameters = {"weight": SOLUTION.reshape(2, 4), "bias": BIAS}
        privacy = PrivacyStatement(
            unit=Unit.SAMPLE,
            epsilon=Decimal(1),
            delta=Decimal("0.001"),
            mechanism="DP-SGD",
            accountant="RDP",
            expected_cohort=1,
            trust_model="protects each record",
        )
        lineage = Lineage(run="run-1", round=number)
        scratch_dir = path / "scratch"
        return asyncio.run(
            coordinator.releases.consider(MODEL, parameters, lineage=lineage, privacy=privacy, scratch_dir=scratch_dir)
        )

    coordinator.start(path / "v2", CANARY_FIRST)
    verdict = consider(1)
    assert verdict.version is None
    assert verdict.value == 1, "what it would have been worth"
    assert verdict.reason.startswith("the rollout of sides version 2 is rolling at 0 %")
    assert coordinator.read_versions() == {"champion": 2, "previous": 1}
    asyncio.run(coordinator.rollouts.approve(MODEL, 2, 1))
    assert consider(2).version == 3
    assert coordinator.read_versions() == {"champion": 3, "previous": 2}
