"""Requests of one tick of the loop run as one batch, and none is worse off for its neighbours."""

import asyncio
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.errors import AgentError, RequestError
from edge_agent.http.batching import WAITING_MAX_S, Job, Outputs, TickBatcher
from edge_agent.inference.model import ServedModel, load_model
from edge_agent.inference.onnx_backend import OnnxBackend
from models.contract.manifest import FileEntry, ModelManifest
from models.tensors.spec import TensorSpec
from tests.simulators.tiny_models import FEATURES, save_version


@pytest.fixture
def model(tmp_path: Path) -> ServedModel:
    served = load_model(tmp_path, save_version(tmp_path))
    served.batching_pays = True
    return served


def ask(batcher: TickBatcher, model: ServedModel, inputs: dict, age_s: float = 0.0) -> "asyncio.Future":
    found = asyncio.get_running_loop().create_future()

    def finish(_job: Job, outputs: Outputs | AgentError) -> None:
        found.set_result(outputs)

    rows = len(next(iter(inputs.values())))
    batcher.add(Job(model, inputs, rows, time.perf_counter() - age_s, finish))
    return found


def features(value: float, rows: int = 1) -> dict:
    return {"features": np.full((rows, FEATURES), value, np.float32)}


def test_requests_of_one_tick_are_one_run_and_each_gets_its_own_rows(model: ServedModel) -> None:
    async def scenario() -> None:
        batcher = TickBatcher(100)
        found = [ask(batcher, model, features(value, rows=value)) for value in range(1, 8)]
        for value, outputs in enumerate(await asyncio.gather(*found), 1):
            np.testing.assert_array_equal(outputs["logits"], np.full((value, 3), value * FEATURES))
        assert model.statistics.snapshot().executions == 1
        await ask(batcher, model, features(1))
        assert model.statistics.snapshot().executions == 2

    asyncio.run(scenario())


def test_request_that_is_alone_runs_at_once_but_never_before_one_that_waits(model: ServedModel) -> None:
    async def scenario() -> None:
        batcher, done = TickBatcher(100), []

        def add(value: int, *, is_alone: bool) -> None:
            finish = partial(lambda value, _job, _outputs: done.append(value), value)
            batcher.add(Job(model, features(value), 1, time.perf_counter(), finish), is_alone=is_alone)

        add(1, is_alone=True)
        assert done == [1]
        add(2, is_alone=False)
        add(3, is_alone=True)
        assert done == [1]
        await asyncio.sleep(0)
        assert done == [1, 2, 3]

    asyncio.run(scenario())


def test_versions_do_not_mix_and_what_does_not_pay_runs_alone(model: ServedModel, tmp_path: Path) -> None:
    async def scenario() -> None:
        other = load_model(tmp_path / "2", save_version(tmp_path / "2", version=2))
        other.batching_pays = False
        batcher = TickBatcher(100)
        found = [ask(batcher, (model, other)[turn % 2], features(1)) for turn in range(8)]
        values = [outputs["logits"][0, 0] for outputs in await asyncio.gather(*found)]
        assert values == [4, 8] * 4
        assert (model.statistics.snapshot().executions, other.statistics.snapshot().executions) == (1, 4)

    asyncio.run(scenario())


def test_request_that_the_graph_fails_on_harms_no_other(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "index"], ["value"])],
        "lookup",
        [helper.make_tensor_value_info("index", TensorProto.INT64, ["batch"])],
        [helper.make_tensor_value_info("value", TensorProto.FLOAT, ["batch"])],
        [numpy_helper.from_array(np.arange(10, dtype=np.float32), "table")],
    )
    path = tmp_path / "inference.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    )
    manifest = ModelManifest(
        model="lookup",
        version=1,
        runtime="onnx",
        inputs=(TensorSpec("index", ("batch",), "int64"),),
        outputs=(TensorSpec("value", ("batch",), "float32"),),
        files={"inference.onnx": FileEntry(digest="0" * 64, size_bytes=1)},
    )

    async def scenario() -> None:
        model = ServedModel(manifest, OnnxBackend(path))
        model.batching_pays = True
        batcher = TickBatcher(100)
        found = [ask(batcher, model, {"index": np.array([index])}) for index in (3, 99, 5)]
        first, bad, last = await asyncio.gather(*found)
        assert (first["value"].tolist(), last["value"].tolist()) == ([3], [5])
        assert isinstance(bad, RequestError)
        assert bad.status == 400

    asyncio.run(scenario())


def test_what_waits_is_bounded_in_number_and_time(model: ServedModel) -> None:
    async def scenario() -> None:
        batcher = TickBatcher(3)
        found = [ask(batcher, model, features(1)), ask(batcher, model, features(1), age_s=WAITING_MAX_S + 1)]
        ask(batcher, model, features(1))
        with pytest.raises(RequestError, match="3 requests are waiting") as refused:
            ask(batcher, model, features(1))
        assert refused.value.status == 429
        answered, late = await asyncio.gather(*found)
        assert answered["logits"][0, 0] == FEATURES
        assert (type(late), late.status) == (RequestError, 503)
        await ask(batcher, model, features(1))

    asyncio.run(scenario())


def test_what_takes_long_runs_beside_the_loop_and_small_requests_overtake_it(model: ServedModel) -> None:
    async def scenario() -> None:
        model.row_s = 0.001
        batcher = TickBatcher(100)
        finished: list[str] = []
        long = [ask(batcher, model, features(1, rows=10_000)) for _ in range(3)]
        long[2].add_done_callback(lambda _: finished.append("long"))
        short = ask(batcher, model, features(2))
        short.add_done_callback(lambda _: finished.append("short"))
        for outputs in await asyncio.gather(*long):
            assert len(outputs["logits"]) == 10_000
        assert (await short)["logits"][0, 0] == 2 * FEATURES
        assert finished == ["short", "long"]

    asyncio.run(scenario())
