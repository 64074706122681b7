"""A coordinator's release path and a device's update path, joined by a broker in memory or by a real one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from edge_agent.link.mqtt import Broker, Link, Publication
from edge_agent.updates.challenger_slot import Challenger
from edge_agent.updates.fetcher import open_offer
from edge_agent.updates.installer import Updater
from edge_agent.updates.settings import UpdaterSettings
from fl_server.directory import Directory
from fl_server.rollout.publisher import Publisher, list_blobs
from fl_server.rollout.repository import ReleaseRepository, _build_target
from models.contract.encoding import build_digest
from models.contract.manifest import (
    EVALUATE_NAME,
    GRAPH_NAMES,
    INFERENCE_NAMES,
    MANIFEST_NAME,
    PARAMETERS_NAME,
    TRAIN_STEP_NAME,
    WEIGHTS_NAME,
    Delta,
    FileEntry,
    ModelManifest,
    Runtime,
    TrainingContract,
    build_manifest,
    parse_manifest,
)
from models.contract.messages import EventKind
from models.contract.offer import ROLE_RELEASES, build_offer, build_release_target
from models.contract.terms import ProbationRules, ReleaseTerms, Role, Split, build_terms
from models.contract.topics import build_offer_topic
from models.contract.wave import Traits
from models.tensors.layout import Layout
from models.tensors.spec import TensorSpec
from tests.simulators.broker_memory import MemoryBroker

FLEET, MODEL, DEVICE = "demo", "digits", "device-1"
TRAITS = Traits(hardware="x86_64", runtimes=("onnx",), agent="1.2.0", region="north")
BIG = bytes(range(256)) * 1000  # 250 KiB: four chunks


class ReleaseServer:
    """What a coordinator does to release a version; its files hold any bytes."""

    def __init__(self, path: Path, broker: MemoryBroker, *, now: datetime | None = None) -> None:
        self.directory, self.broker, self.now = Directory(path), broker, now or datetime.now(UTC)
        self.repository = ReleaseRepository.create(self.directory, now=self.now)
        self.publisher = Publisher(fleet=FLEET, record_path=path / "published.json", publish=broker.publish)
        self.root = self.repository.load_root()

    def write_version(
        self,
        number: int,
        inference: bytes,
        *,
        graph: bytes = b"clip",
        model: str = MODEL,
        trains: bool = True,
        weights: bytes = b"",
        deltas: Mapping[bytes, bytes] | None = None,
        runtime: Runtime = "onnx",
    ) -> Path:
        """Return the folder of a new version; `deltas` are by the weights that each is said to lead from."""
        directory = self.directory.path / "versions" / model / str(number)
        directory.mkdir(parents=True)
        contents = {INFERENCE_NAMES[runtime]: inference, PARAMETERS_NAME: b"float parameters %d" % number}
        if weights:
            contents |= {WEIGHTS_NAME: weights}
        if trains:
            contents |= {TRAIN_STEP_NAME: b"train step " + graph, EVALUATE_NAME: b"evaluate " + graph}
        for name, data in contents.items():
            (directory / name).write_bytes(data)
        listed = {Delta(base=build_digest(base), file=_describe(data)): data for base, data in (deltas or {}).items()}
        for delta, data in listed.items():
            (directory / delta.name).write_bytes(data)
        manifest = ModelManifest(
            model=model,
            version=number,
            runtime=runtime,
            inputs=(TensorSpec("x", ("batch", 2), "float32"),),
            outputs=(TensorSpec("y", ("batch", 2), "float32"),),
            files={name: _describe(data) for name, data in contents.items()},
            deltas=tuple(listed),
            training=TrainingContract(
                layout=Layout(names=("w",), shapes=((2,),)),
                batch=4,
                target=TensorSpec("target", ("batch",), "int64"),
                metric="accuracy",
            )
            if trains
            else None,
        )
        (directory / MANIFEST_NAME).write_bytes(build_manifest(manifest))
        return directory

    def sign_graphs(self, version_dir: Path) -> None:
        files = parse_manifest((version_dir / MANIFEST_NAME).read_bytes()).files
        self.repository.sign_graphs({name: files[name] for name in GRAPH_NAMES if name in files}, now=self.now)

    def release(
        self,
        champion: Path,
        *,
        challenger: Path | None = None,
        split: Split | None = None,
        signs_graphs: bool = True,
        target_model: str = MODEL,
    ) -> bytes:
        """Make `champion` what devices should run, `challenger` beside it; publish all and return the offer."""
        versions: dict[Role, Path] = {"champion": champion}
        if challenger is not None:
            versions["challenger"] = challenger
        if signs_graphs:
            for version in versions.values():
                self.sign_graphs(version)
        manifests = {alias: (version / MANIFEST_NAME).read_bytes() for alias, version in versions.items()}
        self.repository.set_release(target_model, manifests, now=self.now, terms=build_challenge(challenger, split))
        return self.publish(*versions.values())

    def release_with(self, terms: Mapping[Path, ReleaseTerms]) -> bytes:
        """Sign these terms of each version and nothing else; publish all and return the offer."""
        for version in terms:
            self.sign_graphs(version)
        state = self.repository._store.load()
        targets = state.targets[ROLE_RELEASES].targets
        targets.clear()
        for version, signed in terms.items():
            entry = _describe((version / MANIFEST_NAME).read_bytes())
            path = build_release_target(MODEL, signed.role or "champion")
            targets[path] = _build_target(path, entry, build_terms(signed))
        self.repository._issue(state, {ROLE_RELEASES}, self.now)
        return self.publish(*terms)

    def publish(self, *versions: Path) -> bytes:
        offer = build_offer(self.repository.load_metadata())
        pem = self.repository.build_coordinator_pem()
        blobs: dict[str, Path | bytes] = {build_digest(pem): pem}
        for version in versions:
            blobs |= list_blobs(version)
        asyncio.run(self.publisher.publish(offer, blobs))
        return offer


def build_challenge(challenger: Path | None, split: Split | None) -> dict[Role, ReleaseTerms]:
    """Return the terms of the challenger in that folder; of none without one, or where nothing is said of it."""
    if challenger is None or split is None:
        return {}
    version = parse_manifest((challenger / MANIFEST_NAME).read_bytes()).version
    return {"challenger": ReleaseTerms(role="challenger", version=version, split=split)}


def _describe(data: bytes) -> FileEntry:
    return FileEntry(digest=build_digest(data), size_bytes=len(data))


class Shadowed:
    """A version in the shadow, of which a test says what it shows there."""

    def __init__(self, directory: Path, on_failed: Callable[[], None]) -> None:
        self.directory, self.fail, self.reason, self.is_open = directory, on_failed, "", True

    def judge(self) -> str | None:
        return self.reason or None

    def close(self) -> None:
        self.is_open = False


class Device:
    """An updater whose model server only remembers which bytes it was told to answer with."""

    def __init__(
        self, path: Path, broker: MemoryBroker, root: bytes, *, owner_challenges: bool = False, **settings: object
    ) -> None:
        self.path, self.events, self.tried = path, list[tuple[EventKind, str, int | None]](), list[bytes]()
        self.serving: bytes | None = None
        self.challenger: tuple[int, str] | None = None  # version and split, as served
        self.checked: list[tuple[str, ProbationRules]] = []
        self.shadowed: Shadowed | None = None
        defaults = {
            "fleet": FLEET,
            "model": MODEL,
            "device_id": DEVICE,
            "traits": TRAITS,
            "trains": True,
            "retry_delay_s": 3600.0,
        }
        self.updater = Updater(
            UpdaterSettings(state_dir=path, **(defaults | settings)),
            open_offer=partial(open_offer, root=root, trust_dir=path / "tuf"),
            reader=broker,
            check_version=self.check_version,
            open_rehearsal=self.open_rehearsal,
            try_version=self.try_version,
            serve_challenger=None if owner_challenges else self.serve_challenger,
            on_event=lambda *event: self.events.append(event),
        )

    def check_version(self, directory: Path, rules: ProbationRules) -> None:
        self.checked.append((directory.name, rules))

    def open_rehearsal(self, directory: Path, rules: ProbationRules, on_failed: Callable[[], None]) -> "Shadowed":
        self.shadowed = Shadowed(directory, on_failed)
        return self.shadowed

    def try_version(self, directory: Path, manifest: ModelManifest) -> None:
        self.serving = self._try(directory, manifest)

    def _try(self, directory: Path, manifest: ModelManifest) -> bytes:
        inference = b"".join((directory / name).read_bytes() for name in manifest.serving_names)
        self.tried.append(inference)
        if inference.startswith(b"unhealthy"):
            raise ValueError("the output is not finite")
        return inference

    def serve_challenger(self, challenger: Challenger | None) -> None:
        if challenger is None:
            self.challenger = None
            return
        if not challenger.is_proven:
            self._try(challenger.directory, challenger.manifest)
        self.challenger = (challenger.manifest.version, str(challenger.split))

    def receive(self, *offers: bytes) -> list[EventKind]:
        """Start, handle `offers` one after the other, end; return what kinds of events that made."""
        asyncio.run(self._receive(offers))
        return [kind for kind, _, _ in self.events]

    async def _receive(self, offers: tuple[bytes, ...]) -> None:
        await self.updater.start()
        for offer in offers:
            await self.updater.handle_offer(offer)
        await self.updater.close()

    @property
    def version(self) -> int | None:
        current = self.updater.current()
        return None if current is None else current.manifest.version

    @property
    def last_message(self) -> str:
        return self.events[-1][1]


@asynccontextmanager
async def running_device(path: Path, port: int, root: bytes) -> AsyncIterator[tuple[Device, asyncio.Queue[bytes]]]:
    """Yield a device over the agent's own link to the broker at `port`, and the offers that it hears."""
    offers: asyncio.Queue[bytes] = asyncio.Queue()
    link = Link(
        Broker(
            host="127.0.0.1",
            port=port,
            client_id="device-1",
            keepalive_s=30,
            subscriptions=(build_offer_topic(FLEET),),
        ),
        build_will=lambda: Publication(topic=f"fl/v1/{FLEET}/device/device-1/status", payload=b"{}", retain=True),
        on_message=lambda _topic, payload: offers.put_nowait(payload),
        on_connected=lambda: None,
    )
    device = Device(path, link, root)
    running = asyncio.create_task(link.run())
    try:
        yield device, offers
    finally:
        running.cancel()
        await asyncio.wait({running})
        await device.updater.close()
