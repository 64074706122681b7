"""Serving beside its floor, the bare runtime in this process, and beside its peers, in the same minutes.

Every figure is a median of short measurements taken in turn. The load generator is a process of its own on the
same cores as the server: a server that leaves it little time looks slower than it is, all of them alike. Strangers
on the cores slow a server and its load down more, or less, than a loop of calls: believe ratios of a quiet machine.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edge_agent.errors import StalledError
from edge_agent.inference.model import load_version
from tests.bench.load import Address, Load, measure
from tests.bench.peers import UVICORN, prepare_peers, running_peer
from tests.bench.servers import (
    Server,
    build_binary_request,
    build_json_request,
    check_answers,
    running_agent,
    running_bare,
)
from tests.bench.versions import LITERT_DIR, BenchVersion, build_version, feeds

TURNS = 5
PEER_TURNS = 3  # where one server is many times as fast as the other
SECONDS = 1.0  # of one measurement under load
CALLS_S = 0.5  # of calls in this process, half of them before it and half after
SLICES = 61
SLICE_S = 0.015  # a core changes its speed from one tenth of a second to the next
CONNECTIONS = (1, 8, 64)

Call = Callable[[], object]


def run() -> dict[str, float]:
    digits = build_version("digits")
    figures = measure_in_process(digits) | measure_litert()
    with running_all(digits) as (agent, peers):
        figures |= measure_json(digits, {"agent": agent, **peers})
        figures |= measure_binary(digits, agent)
        figures |= measure_uvicorn(digits, agent) | measure_bare(digits)
    if peers:
        least = min(figures[f"{peer}_json_64_p99_us"] for peer in peers)
        figures["json_64_connections_p99_to_best_peer_ratio"] = figures["agent_json_64_p99_us"] / least
        figures["binary_64_connections_p99_to_best_peer_ratio"] = figures["agent_binary_64_p99_us"] / least
    return figures | measure_large(build_version("large"))


def measure_in_process(version: BenchVersion) -> dict[str, float]:
    """Compare the engine's `infer` with the session's own `run`."""
    model, raw, inputs = load_version(version.directory), open_raw(version), feeds(version)
    return _compare_calls("in_process", lambda: model.infer(inputs), "raw_run", lambda: raw.run(None, inputs))


def measure_litert() -> dict[str, float]:
    """Compare `infer` of a TFLite version with the interpreter's own set, invoke and get."""
    try:
        model = load_version(LITERT_DIR)
        from ai_edge_litert.interpreter import Interpreter
    except (ImportError, StalledError) as error:
        print(f"without LiteRT: {error}", file=sys.stderr)
        return {}
    raw = Interpreter(str(LITERT_DIR / "inference.tflite"), num_threads=1)
    raw.allocate_tensors()
    place, out = raw.get_input_details()[0]["index"], raw.get_output_details()[0]["index"]
    spec = model.manifest.inputs[0]
    row = np.ones((1, *spec.row_shape), spec.dtype)

    def invoke() -> object:
        raw.set_tensor(place, row)
        raw.invoke()
        return raw.get_tensor(out)

    return _compare_calls("litert_in_process", lambda: model.infer({spec.name: row}), "raw_invoke", invoke)


@contextlib.contextmanager
def running_all(version: BenchVersion) -> Iterator[tuple[Server, dict[str, Server]]]:
    """Serve `version` by the agent and by every peer there is, each of which answers as it should."""
    request = build_json_request(version)
    expected = open_raw(version).run(None, feeds(version))[0]
    with contextlib.ExitStack() as stack:

        def make_directory() -> Path:
            return Path(stack.enter_context(tempfile.TemporaryDirectory()))

        agent = stack.enter_context(running_agent(version.directory, make_directory()))
        peers = {
            name: stack.enter_context(running_peer(peer, version, make_directory()))
            for name, peer in prepare_peers().items()
        }
        for server in (agent, *peers.values()):
            check_answers(server, version, request, expected)
        check_answers(agent, version, build_binary_request(version), expected)
        yield agent, peers


def measure_json(version: BenchVersion, servers: Mapping[str, Server]) -> dict[str, float]:
    """Compare the agent with its peers, all of them with the same request."""
    request = build_json_request(version)
    figures: dict[str, float] = {}
    for count in CONNECTIONS:
        taken: dict[str, list[Load]] = {name: [] for name in servers}
        for _ in range(PEER_TURNS):
            for name, server in servers.items():
                taken[name].append(measure(server.tcp, request, connections=count, seconds=SECONDS))
        for name, loads in taken.items():
            figures |= _describe(f"{name}_json_{count}", loads)
        for name in servers:
            if name != "agent":
                ratio = figures[f"agent_json_{count}_per_s"] / figures[f"{name}_json_{count}_per_s"]
                figures[f"json_{count}_connections_to_{name}_ratio"] = ratio
    return figures


def measure_binary(version: BenchVersion, agent: Server) -> dict[str, float]:
    """Compare binary tensors over TCP and the Unix socket with calls in this process."""
    request, raw, model = build_binary_request(version), open_raw(version), load_version(version.directory)
    inputs = feeds(version)
    figures: dict[str, float] = {}
    for count in CONNECTIONS:
        loads, calls = _load_beside(lambda: raw.run(None, inputs), agent.tcp, request, count)
        figures |= _describe(f"agent_binary_{count}", loads)
        figures[f"binary_{count}_connections_to_raw_ratio"] = _compare_rates(loads, calls)
    loads, calls = _load_beside(lambda: model.infer(inputs), str(agent.uds), request, 1)
    figures |= _describe("agent_binary_uds_1", loads)
    return figures | {"uds_1_connection_p50_to_in_process_ratio": _compare_p50(loads, calls)}


def measure_bare(version: BenchVersion) -> dict[str, float]:
    """Compare a server that only runs the graph, over the Unix socket, with calls in this process."""
    request, model, inputs = build_binary_request(version), load_version(version.directory), feeds(version)
    with tempfile.TemporaryDirectory() as directory, running_bare(version, Path(directory)) as bare:
        check_answers(bare, version, request, open_raw(version).run(None, inputs)[0])
        loads, calls = _load_beside(lambda: model.infer(inputs), str(bare.uds), request, 1)
    return _describe("bare_uds_1", loads) | {
        "bare_uds_1_connection_p50_to_in_process_ratio": _compare_p50(loads, calls)
    }


def measure_uvicorn(version: BenchVersion, agent: Server) -> dict[str, float]:
    """Compare the agent with the least that uvicorn serves the same binary tensors with."""
    request, figures = build_binary_request(version), dict[str, float]()
    for name, peer in prepare_peers(UVICORN).items():
        with tempfile.TemporaryDirectory() as directory, running_peer(peer, version, Path(directory)) as floor:
            check_answers(floor, version, request, open_raw(version).run(None, feeds(version))[0])
            for count in CONNECTIONS:
                pairs = [
                    [measure(each.tcp, request, connections=count, seconds=SECONDS) for each in (agent, floor)]
                    for _ in range(PEER_TURNS)
                ]
                figures |= _describe(f"{name}_binary_{count}", [theirs for _, theirs in pairs])
                rates: list[float] = [ours.rate / theirs.rate for ours, theirs in pairs]
                delays: list[float] = [ours.p50_us / theirs.p50_us for ours, theirs in pairs]
                figures[f"binary_{count}_connections_to_{name}_ratio"] = statistics.median(rates)
                figures[f"binary_{count}_connections_p50_to_{name}_ratio"] = statistics.median(delays)
            memory = agent.measure_resident_mb() / floor.measure_resident_mb()
            figures[f"resident_mb_to_{name}_ratio"] = memory
    return figures


def measure_large(version: BenchVersion) -> dict[str, float]:
    """Compare a model whose own time counts, 4.6 MB of float32, with the bare session."""
    request, raw, inputs = build_binary_request(version), open_raw(version), feeds(version)
    with tempfile.TemporaryDirectory() as directory, running_agent(version.directory, Path(directory)) as agent:
        check_answers(agent, version, request, raw.run(None, inputs)[0])
        loads, calls = _load_beside(lambda: raw.run(None, inputs), agent.tcp, request, 8)
    figures = _describe("agent_large_binary_8", loads)
    return figures | {"large_binary_8_connections_to_raw_ratio": _compare_rates(loads, calls)}


def open_raw(version: BenchVersion) -> ort.InferenceSession:
    """Return the graph as a user of onnxruntime would open it on a small device."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(version.directory / version.manifest.inference_name, options)


def time_calls(call: Call, seconds: float) -> list[float]:
    """Return how long each call took, s."""
    durations, begun_s = [], time.perf_counter()
    end_s = begun_s + seconds
    while begun_s < end_s:
        call()
        now_s = time.perf_counter()
        durations.append(now_s - begun_s)
        begun_s = now_s
    return durations


def _compare_calls(name: str, call: Call, raw_name: str, raw: Call) -> dict[str, float]:
    times, raw_times = [], []
    for _ in range(SLICES):
        times.append(statistics.median(time_calls(call, SLICE_S)))
        raw_times.append(statistics.median(time_calls(raw, SLICE_S)))
    ratios: list[Any] = [one / other for one, other in zip(times, raw_times, strict=True)]
    return {
        f"{name}_infer_us": statistics.median(times) * 1e6,
        f"{name}_{raw_name}_us": statistics.median(raw_times) * 1e6,
        f"{name}_infer_to_{raw_name}_ratio": statistics.median(ratios),
    }


def _load_beside(
    call: Call, address: Address, request: bytes, connections: int
) -> tuple[list[Load], list[list[float]]]:
    """Return what load on a server, and calls in this process, took in turn."""
    loads, calls = [], []
    for _ in range(TURNS):
        before = time_calls(call, CALLS_S / 2)
        loads.append(measure(address, request, connections=connections, seconds=SECONDS))
        calls.append(before + time_calls(call, CALLS_S / 2))
    return loads, calls


def _compare_rates(loads: list[Load], calls: list[list[float]]) -> float:
    return statistics.median(load.rate * statistics.fmean(taken) for load, taken in zip(loads, calls, strict=True))


def _compare_p50(loads: list[Load], calls: list[list[float]]) -> float:
    return statistics.median(
        load.p50_us / 1e6 / statistics.median(taken) for load, taken in zip(loads, calls, strict=True)
    )


def _describe(name: str, loads: list[Load]) -> dict[str, float]:
    failures = sum(load.failures for load in loads)
    assert failures == 0, f"{name}: {failures} requests failed"
    return {
        f"{name}_per_s": statistics.median(load.rate for load in loads),
        f"{name}_p50_us": statistics.median(load.p50_us for load in loads),
        f"{name}_p99_us": statistics.median(load.p99_us for load in loads),
        f"{name}_load_generator_cpu_share": statistics.median(load.cpu_share for load in loads),
    }
