"""What openapi.json promises holds for whatever schemathesis makes of it: no 5xx but 503, no undocumented status."""

import json
from collections.abc import Iterator
from importlib import resources

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from edge_agent.http.guard import TOKEN_NAME
from tests.simulators.agent import MODEL, AgentProcess, install_version

DESCRIPTION = json.loads(resources.files("edge_agent.http").joinpath("openapi.json").read_text())
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
schema = schemathesis.openapi.from_dict(DESCRIPTION)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    device = AgentProcess(tmp_path_factory.mktemp("a"), extra="[samples]\nconsent = true\n")
    device.state_dir.mkdir()
    install_version(device.state_dir, 2, trainable=True)
    with device:
        yield device


@schema.parametrize()
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_as_described(case: schemathesis.Case, agent: AgentProcess) -> None:
    name = case.path_parameters.get("model")
    if isinstance(name, str) and len(name) % 3:  # the model that is there, more often than chance would have it
        case.path_parameters["model"] = MODEL
        if "version" in case.path_parameters:
            case.path_parameters["version"] = "2"
    token = (agent.state_dir / TOKEN_NAME).read_text().strip()
    response = case.call(base_url=agent.url, headers={"Authorization": f"Bearer {token}"})
    case.validate_response(response, checks=CHECKS)


def test_the_description_is_served_and_nothing_was_an_error_of_the_agent(agent: AgentProcess) -> None:
    assert httpx.get(f"{agent.url}/openapi.json").json() == DESCRIPTION
    assert "ERROR" not in agent.log_path.read_text()


def test_every_address_is_described_and_needs_the_token_where_it_says_so(agent: AgentProcess) -> None:
    for path, item in DESCRIPTION["paths"].items():
        for method, operation in item.items():
            answer = httpx.request(method, agent.url + path.format(model=MODEL, version="2"))
            assert (answer.status_code == 401) == ("security" in operation), path
            assert answer.status_code not in (404, 405), path
