"""From first boot to revocation, with the whole coordinator behind the real nginx."""

import pytest

from edge_agent.config import load_agent_settings
from edge_agent.enrolment import enroll
from edge_agent.errors import TransientError
from edge_agent.training.node import serve
from fl_server.config import ProxySettings, ServerSettings, SuperLinkSettings
from fl_server.demo.processes import find_free_ports
from fl_server.directory import Directory
from fl_server.fleet.roster import Roster
from fl_server.rounds.flower import list_nodes
from tests.simulators.federation import FLEET, Federation
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.nginx import Proxy
from tests.simulators.waiting import wait_until

PULL = "/v1/fleet/pull-messages"


@pytest.fixture
def federation(tmp_path, template):
    with Mosquitto(tmp_path) as broker, Federation(tmp_path / "fed", template, broker_port=broker.port) as federation:
        yield federation


@pytest.fixture
def proxy(federation):
    port, enrolment_port, coordinator_port = find_free_ports(3)
    settings = ServerSettings(
        fleet=FLEET,
        superlink=SuperLinkSettings(port=federation.superlink_port),
        proxy=ProxySettings(port=port, enrolment_port=enrolment_port, coordinator_port=coordinator_port),
    )
    federation.environment |= {
        "FL_SERVER_PROXY__USED": "true",
        "FL_SERVER_PROXY__PORT": str(port),
        "FL_SERVER_PROXY__ENROLMENT_PORT": str(enrolment_port),
        "FL_SERVER_PROXY__COORDINATOR_PORT": str(coordinator_port),
    }
    with Proxy(Directory(federation.directory), settings) as proxy:
        yield proxy


def join(address: str, settings, identity=None) -> bool:
    """Return whether the device is let in as a node."""
    try:
        serve(
            superlink=address,
            ca_path=settings.identity.ca_path,
            node_key_path=settings.federation.node_key_path,
            identity=identity,
            poll_interval_s=0.1,
            idle_timeout_s=1.0,
            handle=lambda *_: None,
            on_joined=lambda: None,
        )
    except TransientError:
        return False
    return True


def test_device_enrols_itself_joins_and_once_revoked_is_out_of_proxy_and_superlink_within_a_minute(
    federation, proxy, tmp_path
):
    federation.start()
    done = federation.command("token", "device-1")
    assert done.returncode == 0, done.stderr
    server = f"127.0.0.1:{proxy.settings.proxy.enrolment_port}"
    assert server in done.stderr
    wait_until(lambda: _try_to_enroll(server, done.stdout, tmp_path / "bundle"), "enrolment", timeout_s=60)
    settings = load_agent_settings(tmp_path / "bundle" / "edge-agent.toml")
    wait_until(lambda: join(settings.federation.superlink, settings, settings.identity), "its node", timeout_s=60)

    assert federation.command("revoke", "device-1").returncode == 0
    wait_until(lambda: proxy.ask(PULL, settings.identity) == 400, "the proxy's refusal", timeout_s=60)
    with Roster(Directory(federation.directory).database_path) as roster:
        wait_until(lambda: roster.list_devices()[0].node_id is None, "the end of the node", timeout_s=60)
    address = f"127.0.0.1:{federation.superlink_port}"
    assert list_nodes(address, settings.identity.ca_path) == {}
    assert not join(address, settings)
    assert not join(settings.federation.superlink, settings, settings.identity)


def _try_to_enroll(server, token, out) -> bool:
    try:
        enroll(server, token, out)
    except TransientError:  # the coordinator starts
        return False
    return True
