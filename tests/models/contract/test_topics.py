"""The topic grammar: what is built parses, and what could mean something else is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.contract.errors import MalformedError
from models.contract.topics import (
    Channel,
    build_blob_topic,
    build_device_filter,
    build_device_topic,
    build_offer_topic,
    build_run_topic,
    check_name,
    parse_device_topic,
)


def test_topics_are_the_documented_ones() -> None:
    assert build_offer_topic("demo") == "fl/v1/demo/offer"
    assert build_blob_topic("demo", "0" * 64, 3) == f"fl/v1/demo/blob/{'0' * 64}/3"
    assert build_run_topic("demo", "digits") == "fl/v1/demo/run/digits"
    assert build_device_topic("demo", "d1", Channel.EVENT) == "fl/v1/demo/device/d1/event"
    assert build_device_filter("demo", Channel.STATUS) == "fl/v1/demo/device/+/status"


@given(name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True), channel=st.sampled_from(Channel))
def test_a_device_topic_parses_back(name: str, channel: Channel) -> None:
    topic = parse_device_topic("demo", build_device_topic("demo", name, channel))
    assert (topic.device_id, topic.channel) == (name, channel)


@pytest.mark.parametrize(
    "name", ["", "+", "#", "a/b", "a\0b", "a" * 65, "a" * 10_000, "ä", ".hidden", "-x", "a b", "a\n", "d+", "💥"]
)
def test_names_that_could_mean_something_else_in_a_topic_or_path_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 64"):
        check_name(name)


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "fl/v1/demo/offer",
        "fl/v1/other/device/d1/status",
        "fl/v1/demo/device/d1",
        "fl/v1/demo/device/d1/status/x",
        "fl/v1/demo/device/+/status",
        "fl/v1/demo/device/d1/shout",
        "x/fl/v1/demo/device/d1/status",
    ],
)
def test_other_topics_are_malformed(topic: str) -> None:
    with pytest.raises(MalformedError):
        parse_device_topic("demo", topic)
