"""The device's Flower node against a real SuperLink."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from edge_agent.errors import StalledError, TransientError
from edge_agent.training.node import serve
from fl_server.rounds.flower import Session, register_nodes
from tests.simulators.superlink import running_fleet, wait_until

ORDER = json.dumps({"payload": json.dumps({"round": 1})}).encode()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    with running_fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


def open_session(fleet, size=10) -> Session:
    return Session(
        address=fleet.superlink.address,
        ca_path=fleet.superlink.ca_path,
        superexec_secret_path=fleet.superlink.secret_path,
        size=size,
    )


def exchange(session, node_id, parameters, envelope=ORDER, *, lifetime_s=30.0):
    session.send(parameters, {node_id: envelope}, lifetime_s=lifetime_s)
    return collect(session)


def collect(session):
    replies = []
    wait_until(lambda: replies.extend(session.collect()) or replies, what="a reply")
    return replies


def serve_here(fleet, key_path: Path, handle=lambda _parameters, _envelope: None, *, idle_timeout_s=2.0, joined=None):
    serve(
        superlink=fleet.superlink.address,
        ca_path=fleet.superlink.ca_path,
        node_key_path=key_path,
        poll_interval_s=0.1,
        idle_timeout_s=idle_timeout_s,
        handle=handle,
        on_joined=joined or (lambda: None),
    )


def test_handler_gets_parameters_and_envelope_and_its_update_reaches_the_coordinator(fleet):
    (node_id,) = fleet.superlink.register("exact").values()
    received, joined = [], []

    def handle(parameters, envelope):
        received.append((parameters, envelope))
        return (parameters * np.float32(2)).tobytes()

    thread = threading.Thread(
        target=serve_here,
        args=(fleet, fleet.superlink.node_keys["exact"], handle),
        kwargs={"idle_timeout_s": 5.0, "joined": lambda: joined.append(True)},
    )
    thread.start()
    parameters = np.linspace(-1, 1, 2_000_001, dtype=np.float32)
    with open_session(fleet, parameters.size) as session:
        wait_until(lambda: node_id in session.list_online())
        for envelope in (b"\x00first", b"second"):
            (reply,) = exchange(session, node_id, parameters, envelope)
            assert reply.node_id == node_id
            assert reply.update == (parameters * np.float32(2)).tobytes()
        thread.join(30)
        assert not thread.is_alive()
        assert node_id not in session.list_online()
    assert [envelope for _, envelope in received] == [b"\x00first", b"second"]
    assert all(given.tobytes() == parameters.tobytes() for given, _ in received)
    assert joined == [True]


def test_handler_that_answers_nothing_or_raises_lets_nothing_through_and_is_asked_again(fleet, caplog):
    (node_id,) = fleet.superlink.register("wavering").values()
    answers = iter([None, RuntimeError("sample 0.1234"), np.ones(3, np.float32).tobytes()])
    asked = []

    def handle(_parameters, envelope):
        asked.append(envelope)
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    thread = threading.Thread(
        target=serve_here, args=(fleet, fleet.superlink.node_keys["wavering"], handle), kwargs={"idle_timeout_s": 5.0}
    )
    thread.start()
    with open_session(fleet) as session:
        wait_until(lambda: node_id in session.list_online())
        for number, envelope in enumerate((b"1", b"2"), start=1):
            session.send(np.zeros(3, np.float32), {node_id: envelope}, lifetime_s=30)
            wait_until(lambda number=number: len(asked) == number)
        replies = exchange(session, node_id, np.zeros(3, np.float32), b"3")
        assert [reply.update for reply in replies] == [np.ones(3, np.float32).tobytes()]
    thread.join(30)
    assert "RuntimeError" in caplog.text
    assert "0.1234" not in caplog.text


def test_strangers_key_is_not_let_in_and_gets_no_message(fleet):
    fleet.superlink.create_key("stranger")  # never registered
    asked = []
    with pytest.raises(TransientError, match="did not let this device in"):
        serve_here(
            fleet,
            fleet.superlink.node_keys["stranger"],
            lambda *message: asked.append(message),
            joined=lambda: asked.append("joined"),
        )
    assert asked == []


def test_superlink_of_another_authority_is_not_joined(fleet, tmp_path):
    with running_fleet(tmp_path) as other:
        fleet.superlink.register("careful")
        with pytest.raises(TransientError):
            serve(
                superlink=fleet.superlink.address,
                ca_path=other.superlink.ca_path,
                node_key_path=fleet.superlink.node_keys["careful"],
                poll_interval_s=0.1,
                idle_timeout_s=1,
                handle=lambda _parameters, _envelope: None,
                on_joined=lambda: None,
            )


@pytest.mark.parametrize("content", [None, b"no key"])
def test_key_that_cannot_be_read_needs_a_person(fleet, tmp_path, content):
    if content is not None:
        (tmp_path / "node.key").write_bytes(content)
    with pytest.raises(StalledError, match=r"node\.key"):
        serve_here(fleet, tmp_path / "node.key")


def test_device_registered_while_it_knocks_is_let_in(fleet):
    key = fleet.superlink.create_key("early")
    node = fleet.start_node("early", poll_s=0.1)
    wait_until(lambda: "HTTP 412" in node.log_path.read_text(), what="a refusal")
    register_nodes(fleet.superlink.address, fleet.superlink.ca_path, {"early": key})
    assert node.next_line() == b"joined\n"


def test_absent_superlink_is_waited_for_and_one_that_forgot_everything_is_joined_anew(tmp_path):
    with running_fleet(tmp_path) as fleet:
        (old_id,) = fleet.superlink.register("patient").values()
        key = fleet.superlink.create_key("patient")
        (new_id,) = register_nodes(fleet.superlink.address, fleet.superlink.ca_path, {"patient": key}).values()
        assert new_id != old_id
        fleet.superlink.kill()
        node = fleet.start_node("patient", poll_s=0.1)
        fleet.superlink.start()
        assert node.next_line() == b"joined\n"
        fleet.superlink.kill()
        for path in fleet.superlink.directory.glob("flwr.db*"):
            path.unlink()
        fleet.superlink.start()
        (node_id,) = register_nodes(fleet.superlink.address, fleet.superlink.ca_path, {"patient": key}).values()
        with open_session(fleet) as session:
            wait_until(lambda: node_id in session.list_online(), what="the node")
            (reply,) = exchange(session, node_id, np.zeros(4, np.float32))
        assert reply.update == np.ones(4, np.float32).tobytes()


def test_message_that_expired_before_it_was_fetched_is_never_trained(fleet):
    (node_id,) = fleet.superlink.register("sleepy").values()
    first = fleet.start_node("sleepy", poll_s=0.1)
    with open_session(fleet) as session:
        wait_until(lambda: node_id in session.list_online())
        first.kill()
        (reply,) = exchange(session, node_id, np.zeros(2, np.float32), lifetime_s=1)
        assert reply.update is None
        assert not reply.failure
        again = fleet.start_node("sleepy", poll_s=0.1)
        assert again.next_line() == b"joined\n"
        session.send(
            np.zeros(2, np.float32), {node_id: json.dumps({"payload": '{"round": 2}'}).encode()}, lifetime_s=30
        )
        assert again.next_line() == b"answered 2\n"
