"""The training process is started once a run, watched, and ended by its id."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import edge_agent.training.supervisor as module
from edge_agent.training.supervisor import LINE_MAX_BYTES, Bounds, Supervisor
from tests.simulators.waiting import wait_until

ECHO = "import sys; print(sys.stdin.read(), flush=True)"
HANG = "import os, sys, signal; signal.signal(signal.SIGTERM, signal.SIG_DFL); print(os.getpid(), flush=True); signal.pause()"
STUBBORN = HANG.replace("SIG_DFL", "SIG_IGN") + "\nwhile True: signal.pause()"


BOUNDS = Bounds(niceness=10, memory_bytes=1 << 30, cpu_s=60)


class Watch:
    def __init__(self, code: str, command: list[str] | None = None, *, bounds: Bounds = BOUNDS) -> None:
        self.lines: list[tuple[str, bytes]] = []
        self.exits: list[tuple[str, str | None]] = []
        self.refusal: asyncio.Future[str] | None = None
        self.supervisor = Supervisor(
            command or [sys.executable, "-c", code],
            bounds=bounds,
            on_line=lambda run, line: self.lines.append((run, line)),
            on_exit=lambda run, problem: self.exits.append((run, problem)),
        )

    async def start(self, run: str = "run-1", job: bytes = b"", *, patience_s: float = 60.0) -> None:
        self.refusal = refusal = asyncio.get_running_loop().create_future()
        await self.supervisor.start(run, job, patience_s=patience_s, wait_for_refusal=lambda: refusal)


async def until(condition: Callable[[], object], what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what)


def run_to_the_end(watch: Watch, *, patience_s: float = 60.0) -> None:
    async def scenario() -> None:
        await watch.start("run-1", b"job", patience_s=patience_s)
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
        await watch.start("run-1")
        await until(lambda: watch.lines, "the first process")
        await watch.start("run-1")
        assert watch.supervisor.run == "run-1"
        first = int(watch.lines[0][1])
        await watch.start("run-2")
        assert not is_alive(first)
        await until(lambda: len(watch.lines) == 2, "the second process")
        await watch.supervisor.stop()

    asyncio.run(scenario())
    assert [run for run, _ in watch.lines] == ["run-1", "run-2"]
    assert watch.exits == [("run-1", "was ended by the agent"), ("run-2", "was ended by the agent")]


def test_process_that_ignores_the_request_to_end_is_killed() -> None:
    watch = Watch(STUBBORN)

    async def scenario() -> None:
        await watch.start("run-1")
        await until(lambda: watch.lines, "the process")
        await watch.supervisor.stop()

    asyncio.run(scenario())
    assert not is_alive(int(watch.lines[0][1]))


def test_stopping_before_the_first_step_leaves_nothing_behind() -> None:
    watch = Watch(HANG)

    async def scenario() -> None:
        await watch.start("run-1")
        await watch.supervisor.stop()
        assert watch.supervisor.run is None
        await watch.supervisor.stop()

    asyncio.run(scenario())


def test_process_stays_behind_whatever_else_runs_and_is_the_first_to_go_without_memory() -> None:
    code = (
        "import os, sys; sys.stdin.read()\n"
        "print(os.environ['OMP_NUM_THREADS'], os.environ['OPENBLAS_NUM_THREADS'], os.sched_getscheduler(0), "
        "os.getpriority(os.PRIO_PROCESS, 0), open('/proc/self/oom_score_adj').read().strip(), flush=True)"
    )
    for niceness, policy in ((19, os.SCHED_IDLE), (5, os.SCHED_OTHER)):
        watch = Watch(code, bounds=Bounds(niceness=niceness, memory_bytes=1 << 30, cpu_s=60))
        run_to_the_end(watch)
        assert watch.lines == [("run-1", b"1 1 %d %d 1000\n" % (policy, niceness))]


def test_process_that_leaks_loops_or_hangs_is_ended_and_the_reason_is_told() -> None:
    leaking = "kept = []\ntry:\n  while True: kept.append(bytearray(1 << 20))\nexcept MemoryError: raise SystemExit(7)"
    bounds = Bounds(niceness=10, memory_bytes=1 << 28, cpu_s=1)
    for code, patience_s, problem in (
        (leaking, 60.0, "ended with exit code 7, the device's log says why"),
        ("while True: pass", 60.0, "was killed by SIGXCPU"),
        (HANG, 0.5, "was ended, as it said nothing for 0.5 s"),
    ):
        watch = Watch(code, bounds=bounds)
        run_to_the_end(watch, patience_s=patience_s)
        assert watch.exits == [("run-1", problem)]


def test_process_is_ended_when_the_machine_is_no_longer_to_train() -> None:
    watch = Watch(HANG)

    async def scenario() -> None:
        await watch.start()
        await until(lambda: watch.lines, "the process")
        assert watch.refusal is not None
        watch.refusal.set_result("it runs on battery")
        await until(lambda: watch.exits, "its end")

    asyncio.run(scenario())
    assert not is_alive(int(watch.lines[0][1]))
    assert watch.exits == [("run-1", "was ended, as this machine is not to train now: it runs on battery")]


def test_supervisor_needs_only_the_standard_library() -> None:
    text = Path(sys.modules[Supervisor.__module__].__file__ or "").read_text()
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported - {"edge_agent"} <= sys.stdlib_module_names


def test_bound_that_the_machine_does_not_grant_leaves_the_others_in_force(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module.resource, "prlimit", refuse)
    watch = Watch("import os, sys; sys.stdin.read(); print(os.getpriority(os.PRIO_PROCESS, 0))")
    run_to_the_end(watch)
    assert watch.lines == [("run-1", b"10\n")]
    assert watch.exits == [("run-1", None)]
