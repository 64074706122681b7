"""A client that keeps asking every device for predictions, and counts what it gets."""

import http.client
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

REQUEST_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request and what came of it.

    Attributes:
        at_s: When it was sent, `time.time()`.
        latency_ms: Until the last byte of the answer.
        version: That answered; None when the request failed.
    """

    at_s: float
    device: int
    latency_ms: float
    version: int | None


class Client:
    """A persistent connection to one device's inference API."""

    def __init__(self, port: int, model: str, input_name: str) -> None:
        self._path, self._input_name = f"/v2/models/{model}/infer", input_name
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT_S)

    def infer(self, rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], int]:
        """Return the model's output for `rows` and the version that gave it.

        Raises:
            OSError, http.client.HTTPException, ValueError, KeyError: There was no good answer.
        """
        tensor = {"name": self._input_name, "shape": rows.shape, "datatype": "FP32", "data": rows.ravel().tolist()}
        try:
            self._connection.request("POST", self._path, json.dumps({"inputs": [tensor]}))
            response = self._connection.getresponse()
            body = response.read()
            if response.status != http.client.OK:
                raise ValueError(f"status {response.status}: {body[:200]!r}")
            document = json.loads(body)
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise
        output = document["outputs"][0]
        return np.array(output["data"], np.float32).reshape(output["shape"]), int(document["model_version"])

    def close(self) -> None:
        self._connection.close()


class LoadGenerator:
    """Asks each device in turn for the prediction of a random row, at a steady rate, until closed."""

    def __init__(self, clients: Sequence[Client], rows: npt.NDArray[np.float32], *, requests_per_s: float) -> None:
        self.answers: list[Answer] = []
        self._clients, self._rows, self._interval_s = clients, rows, 1.0 / requests_per_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        rng = np.random.default_rng(0)
        turn, due = 0, time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            device = turn % len(self._clients)
            row = self._rows[rng.integers(len(self._rows))][None]
            at_s, started = time.time(), time.perf_counter()
            try:
                version: int | None = self._clients[device].infer(row)[1]
            except (OSError, http.client.HTTPException, ValueError, KeyError):
                version = None
            latency_ms = (time.perf_counter() - started) * 1e3
            self.answers.append(Answer(at_s=at_s, device=device, latency_ms=latency_ms, version=version))
            turn += 1
            due = max(due + self._interval_s, time.monotonic() - 1.0)  # after a stall, no more than 1 s is caught up
