"""The training process is started once a run, watched, and ended by its id."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

from edge_agent.training.supervisor import LINE_MAX_BYTES, Supervisor
from tests.simulators.waiting import wait_until

ECHO = "import sys; print(sys.stdin.read(), flush=True)"
HANG = "import os, sys, signal; signal.signal(signal.SIGTERM, signal.SIG_DFL); print(os.getpid(), flush=True); signal.pause()"
STUBBORN = HANG.replace("SIG_DFL", "SIG_IGN") + "\nwhile True: signal.pause()"


class Watch:
    def __init__(self, code: str, command: list[str] | None = None) -> None:
        self.lines: list[tuple[str, bytes]] = []
        self.exits: list[tuple[str, str | None]] = []
        self.supervisor = Supervisor(
            command or [sys.executable, "-c", code],
            on_line=lambda run, line: self.lines.append((run, line)),
            on_exit=lambda run, problem: self.exits.append((run, problem)),
        )


async def until(condition: Callable[[], object], what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what)


def run_to_the_end(watch: Watch) -> None:
    async def scenario() -> None:
        await watch.supervisor.start("run-1", b"job")
        await until(lambda: watch.exits, "the process to end")

    asyncio.run(scenario())
    assert watch.supervisor.run is None


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_job_arrives_and_lines_come_back() -> None:
    watch = Watch(ECHO)
    run_to_the_end(watch)
    assert watch.lines == [("run-1", b"job\n")]
    assert watch.exits == [("run-1", None)]


def test_every_way_to_die_is_named() -> None:
    for code, problem in (
        ("raise SystemExit(3)", "ended with exit code 3, the device's log says why"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        (f"print('x' * {LINE_MAX_BYTES + 10}, flush=True)", f"printed a line of more than {LINE_MAX_BYTES} bytes"),
    ):
        watch = Watch(code)
        run_to_the_end(watch)
        assert watch.exits == [("run-1", problem)]
    watch = Watch("", ["/nonexistent/program"])
    run_to_the_end(watch)
    assert watch.exits == [("run-1", "could not be started: No such file or directory")]


def test_same_run_twice_is_one_process_and_another_run_replaces_it() -> None:
    watch = Watch(HANG)

    async def scenario() -> None:
        await watch.supervisor.start("run-1", b"")
        await until(lambda: watch.lines, "the first process")
        await watch.supervisor.start("run-1", b"")
        assert watch.supervisor.run == "run-1"
        first = int(watch.lines[0][1])
        await watch.supervisor.start("run-2", b"")
        assert not is_alive(first)
        await until(lambda: len(watch.lines) == 2, "the second process")
        await watch.supervisor.stop()

    asyncio.run(scenario())
    assert [run for run, _ in watch.lines] == ["run-1", "run-2"]
    assert watch.exits == [("run-1", "was ended by the agent"), ("run-2", "was ended by the agent")]


def test_process_that_ignores_the_request_to_end_is_killed() -> None:
    watch = Watch(STUBBORN)

    async def scenario() -> None:
        await watch.supervisor.start("run-1", b"")
        await until(lambda: watch.lines, "the process")
        await watch.supervisor.stop()

    asyncio.run(scenario())
    assert not is_alive(int(watch.lines[0][1]))


def test_stopping_before_the_first_step_leaves_nothing_behind() -> None:
    watch = Watch(HANG)

    async def scenario() -> None:
        await watch.supervisor.start("run-1", b"")
        await watch.supervisor.stop()
        assert watch.supervisor.run is None
        await watch.supervisor.stop()

    asyncio.run(scenario())


def test_process_runs_with_one_thread_and_is_the_first_to_go_without_memory() -> None:
    watch = Watch(
        "import os, sys; sys.stdin.read()\n"
        "print(os.environ['OMP_NUM_THREADS'], os.environ['OPENBLAS_NUM_THREADS'], "
        "open('/proc/self/oom_score_adj').read().strip(), flush=True)"
    )
    run_to_the_end(watch)
    assert watch.lines == [("run-1", b"1 1 1000\n")]


def test_supervisor_needs_only_the_standard_library() -> None:
    text = Path(sys.modules[Supervisor.__module__].__file__ or "").read_text()
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported - {"edge_agent"} <= sys.stdlib_module_names
