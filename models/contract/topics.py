"""The MQTT topic grammar: build and parse, nothing else.

fl/v1/{fleet}/offer
fl/v1/{fleet}/blob/{sha256}/{index}
fl/v1/{fleet}/run/{model}
fl/v1/{fleet}/device/{id}/{channel}      channel: status telemetry event ack command
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from models.contract.encoding import check_digest_text
from models.contract.errors import MalformedError

PREFIX = "fl/v1"
# No MQTT wildcard, separator, control character or path traversal can be spelt with these.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Channel(StrEnum):
    """What a device says or is told, the last level of its topics."""

    STATUS = "status"
    TELEMETRY = "telemetry"
    EVENT = "event"
    ACK = "ack"
    COMMAND = "command"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTopic:
    """A parsed `device/{id}/{channel}` topic."""

    device_id: str
    channel: Channel


def check_name(name: str, what: str = "name") -> str:
    """Return `name` if it may name a fleet, device or model.

    Raises:
        ValueError: Anything but 1 to 64 of A-Z a-z 0-9 . _ - beginning with a letter or digit.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r:.80} must be 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit")
    return name


def build_offer_topic(fleet: str) -> str:
    return f"{PREFIX}/{check_name(fleet, 'fleet')}/offer"


def build_blob_topic(fleet: str, digest: str, index: int) -> str:
    check_digest_text(digest)
    if index < 0:
        raise ValueError(f"chunk index {index} is negative")
    return f"{PREFIX}/{check_name(fleet, 'fleet')}/blob/{digest}/{index}"


def build_run_topic(fleet: str, model: str) -> str:
    return f"{PREFIX}/{check_name(fleet, 'fleet')}/run/{check_name(model, 'model')}"


def build_device_topic(fleet: str, device_id: str, channel: Channel) -> str:
    return f"{PREFIX}/{check_name(fleet, 'fleet')}/device/{check_name(device_id, 'device id')}/{channel}"


def build_device_filter(fleet: str, channel: Channel) -> str:
    """Return the subscription that matches `channel` of every device of the fleet."""
    return f"{PREFIX}/{check_name(fleet, 'fleet')}/device/+/{channel}"


def parse_device_topic(fleet: str, topic: str) -> DeviceTopic:
    """Return whose topic it is and which channel.

    Raises:
        MalformedError: Not a device topic of this fleet.
    """
    head = f"{PREFIX}/{fleet}/device/"
    parts = topic.removeprefix(head).split("/")
    if not topic.startswith(head) or len(parts) != 2:
        raise MalformedError(f"topic {topic!r:.120} is not {head}{{id}}/{{channel}}")
    try:
        return DeviceTopic(device_id=check_name(parts[0], "device id"), channel=Channel(parts[1]))
    except ValueError as error:
        raise MalformedError(str(error)) from error
