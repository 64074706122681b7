"""The gRPC server's life: what it takes of a process, what it waits for, how it ends."""

import asyncio
import signal
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest

from edge_agent.http.app import App
from edge_agent.http.listener import Limits
from edge_agent.inference.engine import Engine
from edge_agent.inference.model import load_version
from edge_agent.rpc.messages import load_messages
from edge_agent.rpc.server import GrpcServer
from edge_agent.rpc.service import SERVICE
from models.contract.settings import SettingsError
from tests.simulators.agent import find_free_port
from tests.simulators.local_api import build_device
from tests.simulators.tiny_models import FEATURES, save_version

MESSAGES = load_messages()
TENSOR = {"name": "features", "datatype": "FP32", "shape": [1, FEATURES]}
REQUEST = MESSAGES["ModelInferRequest"](
    model_name="tiny", inputs=[TENSOR], raw_input_contents=[bytes(4 * FEATURES)]
).SerializeToString()
INFER = f"/{SERVICE}/ModelInfer"


def build_app(directory: Path) -> App:
    engine = Engine("tiny")
    save_version(directory)
    engine.activate(load_version(directory))
    return App(build_device(engine), host="127.0.0.1")


def test_slow_sender_and_too_much_at_once_are_refused_and_others_are_served(tmp_path: Path) -> None:
    async def scenario() -> None:
        port, limits = find_free_port(), Limits(request_s=0.2, bodies_bytes=len(REQUEST))
        server = GrpcServer(build_app(tmp_path), "127.0.0.1", port, limits)
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            silent = channel.stream_unary(INFER)()
            infer = channel.unary_unary(INFER)
            assert await infer(REQUEST, timeout=20)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await infer(REQUEST + b"\x1a\x01x", timeout=20)
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "under way" in (refused.value.details() or "")
            assert await silent.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "within 0.2 s" in await silent.details()
            assert await infer(REQUEST, timeout=20)
        await server.stop()

    asyncio.run(scenario())


def test_key_keeps_its_side_and_what_has_begun_is_answered_after_sigterm(tmp_path: Path) -> None:
    for version in (1, 2):
        save_version(tmp_path / str(version), version=version)
    http, port = find_free_port(), find_free_port()
    arguments = ["--http", f"127.0.0.1:{http}", "--grpc", f"127.0.0.1:{port}", "--challenger", str(tmp_path / "2")]
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_agent", "serve", str(tmp_path / "1"), *arguments, "--weight", "0.5"]
    )
    refused: list[grpc.StatusCode] = []
    answered = threading.Semaphore(0)

    def ask_until_refused() -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as own:
            while not process.returncode:
                try:
                    own.unary_unary(INFER)(REQUEST, timeout=20)
                    answered.release()
                except grpc.RpcError as error:
                    refused.append(error.code())
                    return

    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            infer = channel.unary_unary(INFER, response_deserializer=MESSAGES["ModelInferResponse"].FromString)
            infer(REQUEST, timeout=30, wait_for_ready=True)
            sides = []
            for key in map(str, range(30)):
                found = {infer(REQUEST, metadata=(("edge-key", key),), timeout=20).model_version for _ in range(2)}
                sides.append(found)
            assert {frozenset(found) for found in sides} == {frozenset("1"), frozenset("2")}
        threads = [threading.Thread(target=ask_until_refused) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert all(answered.acquire(timeout=20) for _ in range(40))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        for thread in threads:
            thread.join(20)
        # gRPC itself breaks off what arrives while it shuts down.
        assert set(refused) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert grpc.StatusCode.UNAVAILABLE in refused
    finally:
        process.kill()
        process.wait()


def test_address_of_others_is_refused_where_nobody_could_show_a_token(tmp_path: Path) -> None:
    async def scenario() -> None:
        app = build_app(tmp_path)
        with pytest.raises(SettingsError, match="not the loopback"):
            GrpcServer(app, "0.0.0.0", find_free_port())
        first = GrpcServer(app, "::1", port := find_free_port())
        await first.start()
        with pytest.raises(SettingsError, match=f"grpc.port: ::1:{port}"):
            GrpcServer(app, "::1", port)
        await first.stop()

    asyncio.run(scenario())
