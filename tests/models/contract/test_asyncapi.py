"""The AsyncAPI document that consumers read is what the code sends."""

import json
from pathlib import Path

import jsonschema
import pytest

import models.contract
from models.contract.asyncapi import build_asyncapi

COMMITTED = json.loads((Path(models.contract.__file__).parent / "asyncapi.json").read_text())
GOLDEN_DIR = Path(__file__).parent / "golden"


def test_the_committed_document_is_up_to_date() -> None:
    assert build_asyncapi() == COMMITTED


@pytest.mark.parametrize(
    ("name", "schema"),
    [("status", "Status"), ("telemetry", "Telemetry"), ("event", "Event"), ("ack", "Ack"), ("run_notice", "RunNotice"),
     ("wake_command", "WakeCommand")],
)  # fmt: skip
def test_golden_payloads_are_valid_and_junk_is_not(name: str, schema: str) -> None:
    validator = jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{schema}", **COMMITTED})
    payload = json.loads((GOLDEN_DIR / f"{name}.json").read_text())
    validator.validate(payload)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"schema_version": "x"})
