import json

import pytest

from edge_agent.training.job import TrainingEvent, build_event, build_job, parse_event, parse_job
from models.contract.errors import MalformedError
from tests.simulators.training import build_training_job


def test_job_survives_its_way_through_the_pipe(tmp_path):
    job = build_training_job(tmp_path)
    assert parse_job(build_job(job)) == job


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device_id", "../device"),
        ("run", ""),
        ("epsilon_limit", "0"),
        ("epsilon_limit", "Infinity"),
        ("epsilon_limit", "NaN"),
        ("total_epsilon_limit", "0"),
        ("delta", "1"),
        ("noise_multiplier_limit", "-1"),
        ("poll_interval_s", 0),
        ("idle_timeout_s", -1),
    ],
)
def test_job_out_of_range_is_malformed(tmp_path, field, value):
    document = json.loads(build_job(build_training_job(tmp_path)))
    with pytest.raises(MalformedError):
        parse_job(json.dumps({**document, field: value}).encode())


def test_event_is_one_line_whatever_its_message():
    event = TrainingEvent(event="refused", message="two\nlines", round=3, epsilon="1.5")
    line = build_event(event)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert parse_event(line) == event
