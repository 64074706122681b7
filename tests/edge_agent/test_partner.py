"""A child that stays and answers: whatever it does, who asks gets an answer or one error, in time."""

import threading
from contextlib import closing
from pathlib import Path

import pytest

from edge_agent.children import DeadlineError
from edge_agent.errors import StalledError
from edge_agent.partner import Partner

ECHO = """
import sys
from edge_agent.partner import build_message, read_message
while (message := read_message(sys.stdin.buffer)) is not None:
    if message == b"loop":
        while True: pass
    if message == b"end":
        sys.exit(3)
    answer = bytes(1 << 20) if message == b"long" else message[::-1]
    sys.stdout.buffer.write(build_message(answer))
    sys.stdout.buffer.flush()
"""
MAX_BYTES = 1 << 20


@pytest.fixture
def partner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "echo.py").write_text(ECHO)
    with closing(Partner("echo", deadline_s=1)) as partner:
        yield partner


def test_messages_of_any_length_are_answered_in_order(partner: Partner) -> None:
    for message in (b"ab", b"", b"c" * MAX_BYTES, b"de"):
        assert partner.ask(message, answer_max_bytes=MAX_BYTES) == message[::-1]


@pytest.mark.parametrize(
    ("message", "error", "said"),
    [
        (b"loop", DeadlineError, "not done within 1 s"),
        (b"end", StalledError, "ended with exit code 3"),
        (b"long", StalledError, "it answers 1048576 bytes, at most 10 are read"),
    ],
)
def test_child_that_does_not_answer_as_it_should_is_one_error(
    partner: Partner, message: bytes, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        partner.ask(message, answer_max_bytes=10)


def test_child_that_is_closed_meanwhile_keeps_nobody_waiting(partner: Partner) -> None:
    closing_soon = threading.Timer(0.2, partner.close)
    closing_soon.start()
    with pytest.raises(StalledError, match="ended"):
        partner.ask(b"loop", answer_max_bytes=10)
    closing_soon.join()
    with pytest.raises(StalledError, match="ended"):
        partner.ask(b"ab", answer_max_bytes=10)
