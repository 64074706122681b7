"""Many devices in one process that say what devices say, over real MQTT 5 connections: `python -m tests.simulators.light_fleet`.

Reads a `Fleet` as JSON from its first argument, and prints a `Said` as JSON. It speaks just enough MQTT itself, since a
thousand clients of a library would take the cores that the coordinator is measured on.
"""

import asyncio
import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import cast

import uvloop

from models.contract.encoding import build_json
from models.contract.messages import Status, Telemetry
from models.contract.topics import Channel, build_device_topic

_CONNACK, _PUBACK = 2, 4
_RETAINED = 0x01


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Who says how much.

    Attributes:
        interval_s: Between two telemetry messages of one device.
        seconds: After which it ends.
    """

    port: int
    fleet: str
    devices: int
    interval_s: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What was said, and how much of it the broker has confirmed."""

    sent: int
    confirmed: int
    cpu_share: float


def name_device(number: int) -> str:
    return f"device-{number}"


class _Device(asyncio.Protocol):
    def __init__(self, fleet: str, number: int) -> None:
        self.sent = self.confirmed = 0
        self.connected = asyncio.get_running_loop().create_future()
        self._name = name_device(number)
        self._topics = {channel: build_device_topic(fleet, self._name, channel) for channel in Channel}
        self._unread = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of no base of asyncio's
        self._transport.write(
            _build_packet(0x10, _build_text("MQTT") + b"\x05\x02\x00\x3c\x00" + _build_text(self._name))
        )

    def data_received(self, data: bytes) -> None:
        self._unread += data
        while len(self._unread) > 1 and len(self._unread) >= 2 + self._unread[1]:  # all are shorter than 128 bytes
            kind, end = self._unread[0] >> 4, 2 + self._unread[1]
            self._unread = self._unread[end:]
            self.confirmed += kind == _PUBACK
            if kind == _CONNACK:
                self.connected.set_result(None)

    def say(self, channel: Channel, payload: bytes, flags: int = 0) -> None:
        assert self._transport is not None
        self.sent += 1
        identifier = (self.sent % 65_535 + 1).to_bytes(2, "big")
        body = _build_text(self._topics[channel]) + identifier + b"\x00" + payload
        self._transport.write(_build_packet(0x32 | flags, body))

    async def live(self, delay_s: float, interval_s: float) -> None:
        status = Status(sent_at=time.time(), online=True, agent="0.1", model="digits", version=1, slot="a", trains=True)
        self.say(Channel.STATUS, build_json(status), _RETAINED)
        started = time.monotonic()
        await asyncio.sleep(delay_s)
        number = 0
        while True:
            telemetry = Telemetry(
                id=f"{number:032x}",
                sent_at=time.time(),
                uptime_s=float(number),
                rss_mb=83.1,
                model="digits",
                version=1,
                latency_p50_ms=0.21,
                latency_p99_ms=0.9,
            )
            self.say(Channel.TELEMETRY, build_json(telemetry))
            number += 1
            await asyncio.sleep(started + delay_s + number * interval_s - time.monotonic())


def _build_text(text: str) -> bytes:
    return len(text).to_bytes(2, "big") + text.encode()


def _build_packet(head: int, body: bytes) -> bytes:
    length, left = bytearray(), len(body)
    while True:
        left, digit = left >> 7, left & 127
        length.append(digit | 128 if left else digit)
        if not left:
            return bytes([head]) + length + body


async def run(fleet: Fleet) -> Said:
    """Let all devices connect, one after the other, and live for a while."""
    loop, devices = asyncio.get_running_loop(), []
    for number in range(fleet.devices):
        device = _Device(fleet.fleet, number)
        await loop.create_connection(lambda device=device: device, "127.0.0.1", fleet.port)  # type: ignore[misc]
        await asyncio.wait_for(device.connected, 20)
        devices.append(device)
    print("connected", flush=True)
    before = time.process_time()
    interval_s = fleet.interval_s
    lives = [device.live(interval_s * number / fleet.devices, interval_s) for number, device in enumerate(devices)]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(fleet.seconds):
            await asyncio.gather(*lives)
    return Said(
        sent=sum(device.sent for device in devices),
        confirmed=sum(device.confirmed for device in devices),
        cpu_share=(time.process_time() - before) / fleet.seconds,
    )


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        said = runner.run(run(Fleet(**json.loads(sys.argv[1]))))
    print(json.dumps(asdict(said)), flush=True)
