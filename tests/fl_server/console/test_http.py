import asyncio
import ssl
from http import HTTPStatus

import pytest

from fl_server.authority import Authority
from fl_server.console import http
from fl_server.console.http import Answer, answering
from fl_server.demo.processes import find_free_ports


async def exchange(tmp_path, sent: bytes, decide) -> bytes:
    Authority.create(tmp_path / "ca", fleet="demo").issue_servers(["127.0.0.1"])
    (port,) = find_free_ports(1)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "ca" / "superlink.pem", tmp_path / "ca" / "superlink.key.pem")
    client = ssl.create_default_context(cafile=tmp_path / "ca" / "ca.pem")
    async with answering(port, server, decide):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
        writer.write(sent)
        answer = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        return answer


def test_request_reaches_who_decides_and_the_answer_comes_back(tmp_path):
    requests = []

    def decide(request):
        requests.append(request)
        return Answer(status=HTTPStatus.OK, body=b'{"a":1}')

    sent = b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nX-Thing: b\r\n\r\nabc"
    answer = asyncio.run(exchange(tmp_path, sent, decide))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b'\r\n\r\n{"a":1}')
    (request,) = requests
    assert (request.method, request.path, request.body, request.headers["x-thing"]) == (
        *("POST", "/v1/enroll"),
        *(b"abc", "b"),
    )


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nContent-Length: 16385\r\n\r\n", b"413"),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", b"413"),
        (b"POST / HTTP/1.1\r\nA: " + b"x" * 40_000 + b"\r\n\r\n", b"431"),
    ],
)
def test_what_is_no_request_or_too_long_is_refused_unread(tmp_path, sent, status):
    answer = asyncio.run(exchange(tmp_path, sent, lambda _: pytest.fail("it was decided on")))
    assert answer.split()[1] == status


def test_sender_that_never_ends_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(http, "DEADLINE_S", 0.3)
    assert asyncio.run(exchange(tmp_path, b"POST / HTTP/1.1\r\n", lambda _: pytest.fail("it was decided on"))) == b""
