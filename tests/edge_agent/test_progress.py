"""Long work says how far it is: in one changing line on a terminal, in plain lines elsewhere."""

import io

from edge_agent.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO) -> str:
    times_s = [0.0]
    progress = Progress("rows", done=100, stream=stream, clock=lambda: times_s[-1])
    for now_s in (0.1, 1.0, 11.0, 12.0):
        times_s.append(now_s)
        progress.add(11)
    progress.end()
    assert progress.done == 144
    return stream.getvalue()


def test_terminal_shows_one_line_that_changes() -> None:
    assert show(Terminal()) == "\r122 rows, 22/s\r133 rows, 3/s\r144 rows, 4/s\r144 rows, 4/s\n"


def test_elsewhere_a_plain_line_comes_now_and_then() -> None:
    assert show(io.StringIO()) == "133 rows, 3/s\n"
