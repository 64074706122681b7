"""A model is changed for another while requests are under way, and none of them fails."""

import asyncio
import http.client
import json
import threading
from pathlib import Path

from edge_agent.http.app import App
from edge_agent.http.server import HttpServer, bind_sockets
from edge_agent.inference.engine import Engine
from edge_agent.inference.model import load_model
from tests.simulators.agent import find_free_port
from tests.simulators.local_api import build_device
from tests.simulators.tiny_models import FEATURES, save_version

SWAPS = 100
BODY = json.dumps(
    {"inputs": [{"name": "features", "shape": [1, FEATURES], "datatype": "FP32", "data": [1.0] * FEATURES}]}
)


def ask_until(port: int, enough: threading.Event, seen: list[tuple[int, float]]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    while not enough.is_set():
        connection.request("POST", "/v2/models/tiny/infer", BODY)
        answer = connection.getresponse()
        document = json.loads(answer.read())
        assert answer.status == 200, document
        seen.append((int(document["model_version"]), document["outputs"][0]["data"][0]))


def test_no_request_fails_in_a_hundred_swaps_and_every_answer_is_of_the_version_it_names(tmp_path: Path) -> None:
    async def scenario() -> None:
        engine, port = Engine("tiny"), find_free_port()
        manifests = [save_version(tmp_path / str(version), version=version) for version in (1, 2)]
        engine.activate(load_model(tmp_path / "1", manifests[0]))
        sockets = bind_sockets("127.0.0.1", port, tmp_path / "s")
        server = HttpServer(App(build_device(engine), host="127.0.0.1").handle, sockets)
        serving = asyncio.create_task(server.serve())
        await server.wait_listening()
        seen: list[tuple[int, float]] = []
        enough = threading.Event()
        asking = [asyncio.create_task(asyncio.to_thread(ask_until, port, enough, seen)) for _ in range(3)]
        try:
            for number in range(SWAPS):
                manifest = manifests[(number + 1) % 2]
                model = await asyncio.to_thread(load_model, tmp_path / str(manifest.version), manifest)
                engine.activate(model)
        finally:
            enough.set()
        await asyncio.gather(*asking)
        server.stop()
        await serving
        assert len(seen) > SWAPS
        assert {version for version, _ in seen} == {1, 2}
        assert all(value == version * FEATURES for version, value in seen)

    asyncio.run(scenario())
