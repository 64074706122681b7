import os
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from models.doctor.machine import check_broker, check_clock, check_disk, check_port_free, check_private
from tests.simulators.mosquitto import Mosquitto

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def test_a_clock_before_what_was_signed_already_fails() -> None:
    finding = check_clock(now=NOW, signed_at=NOW + timedelta(minutes=1))
    assert (finding.level, "has been signed already" in finding.found) == ("fail", True)
    assert check_clock(now=NOW, signed_at=NOW - timedelta(minutes=1)).level in {"ok", "warn"}


def test_a_broker_that_answers_is_told_from_one_that_refuses_and_from_what_is_none(tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as broker:
        assert check_broker("127.0.0.1", broker.port, None).level == "ok"
        over_tls = check_broker("127.0.0.1", broker.port, ssl.create_default_context())
        assert over_tls.level == "fail"
    gone = check_broker("127.0.0.1", broker.port, None)
    assert (gone.level, gone.found) == ("fail", f"127.0.0.1:{broker.port}: Connection refused")
    assert gone.advice


@pytest.mark.parametrize(
    ("answer", "said"),
    [(b"HTTP/1.1 400 Bad Request\r\n\r\n", "not as an MQTT 5 broker"), (b"\x20\x03\x00\x87\x00", "0x87")],
)
def test_what_answers_otherwise_is_named(answer: bytes, said: str) -> None:
    def refuse() -> None:
        stream, _ = listener.accept()
        with stream:
            stream.recv(64)
            stream.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=refuse)
        answering.start()
        finding = check_broker("127.0.0.1", listener.getsockname()[1], None)
        answering.join()
    assert (finding.level, said in finding.found) == ("fail", True)


def test_a_broker_is_not_greeted_while_the_service_has_a_session_under_the_same_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        finding = check_broker("127.0.0.1", listener.getsockname()[1], None, is_running=True)
        stream, _ = listener.accept()
        with stream:
            assert stream.recv(16) == b""
    assert finding.level == "ok"


def test_a_disk_takes_and_syncs_a_file_or_the_folder_is_named(tmp_path: Path) -> None:
    assert check_disk(tmp_path).level in {"ok", "warn"}
    assert list(tmp_path.iterdir()) == []
    missing = check_disk(tmp_path / "none")
    assert (missing.level, str(tmp_path / "none") in missing.found) == ("fail", True)


def test_a_folder_that_others_may_look_into_fails(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    assert check_private(tmp_path).level == "ok"
    tmp_path.chmod(0o751)
    assert check_private(tmp_path).advice == f"chmod o= {tmp_path}"


def test_a_taken_port_is_named_with_its_key() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        finding = check_port_free("127.0.0.1", taken.getsockname()[1], key="[http] port")
    assert (finding.level, "[http] port" in finding.advice) == ("fail", True)
    assert os.strerror(98) in finding.found
