"""The floor of an answer over a socket from Python: one read, one run of the graph, one write, and no HTTP to speak of.

`python -m tests.bench.bare GRAPH PORT UDS`. It takes every request for one binary row that came in one piece, checks
nothing, and says the same head each time.
"""

import asyncio
import sys
from typing import cast

import numpy as np
import onnxruntime as ort
import uvloop


class Bare(asyncio.Protocol):
    """One connection; requests that are too short for a row are told that all is well."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        (only,) = session.get_inputs()
        self._name, self._shape = only.name, (1, *only.shape[1:])
        self._row_bytes = 4 * int(np.prod(self._shape))
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if len(data) < self._row_bytes:
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            return
        row = np.frombuffer(data[-self._row_bytes :], np.float32).reshape(self._shape)
        (outputs,) = self._session.run(None, {self._name: row})
        body = outputs.tobytes()
        if not self._head:
            self._head = b"HTTP/1.1 200 OK\r\ninference-header-content-length: 0\r\ncontent-length: %d\r\n\r\n" % len(
                body
            )
        self._transport.write(self._head + body)


async def serve(graph: str, port: int, uds: str) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session, loop = ort.InferenceSession(graph, options), asyncio.get_running_loop()
    await loop.create_unix_server(lambda: Bare(session), uds)
    await (await loop.create_server(lambda: Bare(session), "127.0.0.1", port)).serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
