"""The gRPC server's life: what it takes of a process, what it waits for, how it ends."""

import asyncio
import contextlib
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
from edge_agent.rpc.server import CONNECTIONS_MAX, GrpcServer
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
HTTP2_BEGINNING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # and empty settings


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


def test_senders_that_hold_every_place_make_room_for_who_waits(tmp_path: Path) -> None:
    async def scenario() -> None:
        port, limits = find_free_port(), Limits(body_bytes=len(REQUEST), bodies_bytes=2 * len(REQUEST), request_s=60)
        server = GrpcServer(build_app(tmp_path), "127.0.0.1", port, limits)
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            silent = [channel.stream_unary(INFER)() for _ in range(8)]
            for call in silent:
                await call.wait_for_connection()
            assert await channel.unary_unary(INFER)(REQUEST, timeout=20)
            assert await silent[0].code() == grpc.StatusCode.UNAVAILABLE
            assert "too slowly while others waited" in await silent[0].details()
        await server.stop()

    asyncio.run(scenario())


def test_connection_too_many_and_what_a_web_page_can_say_are_closed_unanswered(tmp_path: Path) -> None:
    async def connect(port: int, said: bytes) -> tuple[bytes, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            writer.write(said)
            async with asyncio.timeout(20):
                return await reader.read(9), writer
        return b"", writer

    async def scenario() -> None:
        server = GrpcServer(build_app(tmp_path), "127.0.0.1", port := find_free_port())
        await server.start()
        answer, page = await connect(port, b"POST %b HTTP/1.1\r\nhost: web.example\r\n\r\n" % INFER.encode())
        page.close()
        assert not answer.startswith(b"HTTP/1")
        found = [await connect(port, HTTP2_BEGINNING) for _ in range(CONNECTIONS_MAX + 1)]
        answers = [bool(answer) for answer, _ in found]
        assert answers == [True] * CONNECTIONS_MAX + [False]
        for _, writer in found:
            writer.close()
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
