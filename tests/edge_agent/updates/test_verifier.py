"""An offer is verified in a process of its own, with the same verdict as inside."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from edge_agent.errors import StalledError
from edge_agent.updates.fetcher import open_offer
from edge_agent.updates.verifier import verify_offer
from models.contract.offer import COORDINATOR_KEY_TARGET, build_graph_target, build_offer
from tests.simulators.broker_memory import MemoryBroker
from tests.simulators.releases import ReleaseServer

CHAMPION = "releases/digits/champion/manifest.json"


@pytest.fixture
def server(tmp_path: Path) -> ReleaseServer:
    return ReleaseServer(tmp_path / "server", MemoryBroker(), now=datetime.now(UTC))


def test_targets_are_those_that_verify_inside(tmp_path: Path, server: ReleaseServer) -> None:
    offer = server.release(server.write_version(1, b"one"))
    apart = verify_offer(offer, root=server.root, trust_dir=tmp_path / "apart")
    inside = open_offer(offer, root=server.root, trust_dir=tmp_path / "inside")
    assert apart == inside
    assert {path.split("/")[0] for path in apart.signed} == {"releases", "keys", "graphs"}
    assert apart.find_target(CHAMPION) is not None
    assert apart.find_target(COORDINATOR_KEY_TARGET) is not None
    assert apart.find_target(build_graph_target("0" * 64, "train_step.onnx")) is None


def test_what_was_trusted_once_holds_in_the_next_process(tmp_path: Path, server: ReleaseServer) -> None:
    old = server.release(server.write_version(1, b"one"))
    new = server.release(server.write_version(2, b"two"))
    trust_dir = tmp_path / "trust"
    verify_offer(new, root=server.root, trust_dir=trust_dir)
    with pytest.raises(StalledError, match=r"offer refused: .*version"):
        verify_offer(old, root=server.root, trust_dir=trust_dir)
    verify_offer(new, root=server.root, trust_dir=trust_dir)


def test_refusals_come_through_in_words(tmp_path: Path, server: ReleaseServer) -> None:
    stranger = ReleaseServer(tmp_path / "stranger", MemoryBroker())
    offer = server.release(server.write_version(1, b"one"))
    for payload, root, said in (
        (b"junk", server.root, "offer refused"),
        (offer, stranger.root, "offer refused: .*signed"),
        (build_offer({"timestamp.json": b"{}"}), server.root, "offer refused"),
    ):
        with pytest.raises(StalledError, match=said):
            verify_offer(payload, root=root, trust_dir=tmp_path / "trust")


def test_trust_that_cannot_be_kept_is_said(tmp_path: Path, server: ReleaseServer) -> None:
    (tmp_path / "file").touch()
    offer = server.release(server.write_version(1, b"one"))
    with pytest.raises(StalledError, match="file"):
        verify_offer(offer, root=server.root, trust_dir=tmp_path / "file" / "trust")
