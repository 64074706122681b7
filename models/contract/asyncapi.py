"""The AsyncAPI description of the topics, made from the message classes themselves.

`python -m models.contract.asyncapi > models/contract/asyncapi.json` after a message has changed.
No field described here derives from a device's private samples.
"""

import json
from dataclasses import dataclass
from typing import Any

import msgspec

from models.contract.envelope import RunNotice, WakeCommand
from models.contract.messages import Ack, Event, Status, Telemetry
from models.contract.topics import PREFIX, Channel

_SCHEMAS = "#/components/schemas/"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Topic:
    address: str
    sender: str
    summary: str
    retained: bool = False
    message: type | None = None  # None: bytes that are no JSON
    signed: bool = False


_TOPICS = {
    "offer": _Topic(
        address="offer", sender="coordinator", retained=True, summary="All TUF metadata, zstd-compressed JSON."
    ),
    "blob": _Topic(
        address="blob/{sha256}/{index}",
        sender="coordinator",
        retained=True,
        summary="One chunk of an artifact, at most 64 KiB.",
    ),
    "run": _Topic(
        address="run/{model}",
        sender="coordinator",
        retained=True,
        message=RunNotice,
        signed=True,
        summary="The open or last run of a model and its privacy plan.",
    ),
    Channel.STATUS: _Topic(
        address="device/{id}/status",
        sender="device",
        retained=True,
        message=Status,
        summary="Last known state; the broker says `online: false` when the device vanishes.",
    ),
    Channel.TELEMETRY: _Topic(
        address="device/{id}/telemetry", sender="device", message=Telemetry, summary="Periodic measurements."
    ),
    Channel.EVENT: _Topic(
        address="device/{id}/event", sender="device", message=Event, summary="What happened, once each."
    ),
    Channel.ACK: _Topic(
        address="device/{id}/ack", sender="coordinator", message=Ack, summary="Events that are safely on disk."
    ),
    Channel.COMMAND: _Topic(
        address="device/{id}/command",
        sender="coordinator",
        message=WakeCommand,
        signed=True,
        summary="Signed and expiring; acted on once.",
    ),
}


def build_asyncapi() -> dict[str, Any]:
    """Return the AsyncAPI 3.0 document of all topics, payloads included."""
    kinds = [topic.message for topic in _TOPICS.values() if topic.message is not None]
    _, schemas = msgspec.json.schema_components(kinds, ref_template=_SCHEMAS + "{name}")
    schemas["Envelope"] = {
        "title": "Envelope",
        "description": "`payload` is the canonical JSON of the order, `signature` its Ed25519 signature in base64.",
        "type": "object",
        "properties": {"payload": {"type": "string"}, "signature": {"type": "string", "contentEncoding": "base64"}},
        "required": ["payload", "signature"],
    }
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "edge-fl over MQTT 5", "version": PREFIX.rpartition("/")[2]},
        "defaultContentType": "application/json",
        "channels": {name: _build_channel(name, topic) for name, topic in _TOPICS.items()},
        "operations": {
            f"{topic.sender}-sends-{name}": {"action": "send", "channel": {"$ref": f"#/channels/{name}"}}
            for name, topic in _TOPICS.items()
        },
        "components": {"schemas": schemas},
    }


def _build_channel(name: str, topic: _Topic) -> dict[str, Any]:
    levels = [level[1:-1] for level in topic.address.split("/") if level.startswith("{")]
    message: dict[str, Any] = {"bindings": {"mqtt": {"bindingVersion": "0.2.0"}}}
    if topic.message is None:
        message |= {"contentType": "application/octet-stream"}
    elif topic.signed:
        message |= {
            "payload": {"$ref": f"{_SCHEMAS}Envelope"},
            "x-payload": {"$ref": _SCHEMAS + topic.message.__name__},
        }
    else:
        message |= {"payload": {"$ref": _SCHEMAS + topic.message.__name__}}
    return {
        "address": f"{PREFIX}/{{fleet}}/{topic.address}",
        "description": topic.summary,
        "parameters": {level: {} for level in ["fleet", *levels]},
        "messages": {name: message},
        "x-retained": topic.retained,
    }


def main() -> None:
    """Print the document."""
    print(json.dumps(build_asyncapi(), indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
