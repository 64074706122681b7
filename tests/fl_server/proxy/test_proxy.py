"""What gets through the real nginx to a real SuperLink."""

import json
import re
import shutil
import threading

import numpy as np
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from edge_agent.errors import TransientError
from edge_agent.training.node import serve
from fl_server.authority import Authority
from fl_server.config import ProxySettings, SuperLinkSettings
from fl_server.rounds.flower import Session, list_nodes, unregister_nodes, unregister_others
from models.tensors.uplink import encode_update
from tests.simulators.nginx import Proxy
from tests.simulators.superlink import SuperLink, wait_until

ORDER = json.dumps({"payload": json.dumps({"round": 1})}).encode()
PULL = "/v1/fleet/pull-messages"


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    with Proxy.create(tmp_path_factory.mktemp("proxy") / "federation") as proxy:
        yield proxy


@pytest.fixture(scope="module")
def superlink(proxy):
    (proxy.directory.ca_dir / "secret").write_text("0123456789abcdef" * 4)
    superlink = SuperLink(directory=proxy.directory.ca_dir, port=proxy.settings.superlink.port)
    superlink.start()
    yield superlink
    superlink.kill()


def join(address, proxy: Proxy, node_key_path, identity=None, *, idle_timeout_s=1.0, handle=None, joined=None):
    serve(
        superlink=address,
        ca_path=proxy.directory.ca_path,
        node_key_path=node_key_path,
        identity=identity,
        poll_interval_s=0.1,
        idle_timeout_s=idle_timeout_s,
        handle=handle or (lambda *_: None),
        on_joined=joined or (lambda: None),
    )


def create_node_key(path):
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return path


def test_device_answers_through_the_proxy_and_nothing_listens_beyond_the_loopback(proxy, superlink):
    (node_id,) = superlink.register("device-1").values()
    identity, _ = proxy.create_identity("device-1")
    joined = threading.Event()
    update = np.arange(300_000, dtype=np.float32)

    def answer(parameters, _envelope):
        return encode_update(parameters + update, "float32", np.random.default_rng())

    thread = threading.Thread(
        target=join,
        args=(proxy.settings.fleet_address, proxy, superlink.node_keys["device-1"], identity),
        kwargs={"idle_timeout_s": 3.0, "handle": answer, "joined": joined.set},
    )
    thread.start()
    assert joined.wait(30)
    replies = []
    with Session(
        address=superlink.address, ca_path=superlink.ca_path, superexec_secret_path=superlink.secret_path, size=300_000
    ) as session:
        session.send(np.ones(300_000, np.float32), {node_id: ORDER}, lifetime_s=30)
        wait_until(lambda: replies.extend(session.collect()) or replies, what="a reply")
    thread.join(30)
    assert len(replies) == 1
    assert np.array_equal(np.frombuffer(replies[0].update, "<f4"), update + 1)
    servers = [superlink.process, proxy.process]
    processes = [found for server in servers for found in _list_family(server.pid)]
    doors = {door.laddr for process in processes for door in process.net_connections() if door.status == "LISTEN"}
    assert {superlink.port, proxy.settings.proxy.port} <= {door.port for door in doors}
    assert {door.ip for door in doors} == {"127.0.0.1"}


def _list_family(pid):
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@pytest.mark.parametrize("holder", ["nothing but the authority's certificate", "a certificate of another authority"])
def test_stranger_gets_no_answer_no_node_and_no_task(proxy, superlink, tmp_path, holder):
    identity = None
    if holder.startswith("a cert"):
        other = Authority.create(tmp_path / "ca", fleet="demo")
        identity, _ = proxy.create_identity("device-1", other)
    before = list_nodes(superlink.address, superlink.ca_path)
    for path in (PULL, "/v1/fleet/activate-node", "/v1/control/start-run", "/v1/control/list-nodes", "/v1/renew", "/"):
        assert proxy.ask(path, identity) == 400, path
    node_key_path = create_node_key(tmp_path / "node.key")
    with pytest.raises(TransientError, match=r"did not let"):
        join(proxy.settings.fleet_address, proxy, node_key_path, identity)
    with pytest.raises(TransientError, match=r"did not let"):  # one on the coordinator's machine itself
        join(superlink.address, proxy, node_key_path)
    assert list_nodes(superlink.address, superlink.ca_path) == before


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/control/start-run",
        "/v1/runtime/pull-app-messages",
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet%2f..%2fcontrol/list-nodes",
        "//v1//control/list-nodes",
        "/docs",
        "/openapi.json",
        "/v1/enroll",
    ],
)
def test_device_reaches_nothing_of_the_superlink_but_what_nodes_need(proxy, superlink, path):
    identity, _ = proxy.create_identity("device-2")
    assert proxy.ask(path, identity) == 404
    assert proxy.ask(PULL, identity) not in (400, 404, 502)  # the door itself is open
    assert proxy.ask(PULL, identity, method="GET") == 403


def test_door_for_newcomers_gives_the_authoritys_certificate_and_no_way_to_the_superlink(proxy, superlink):
    port = proxy.settings.proxy.enrolment_port
    connection = proxy.connect(None, port=port)
    connection.request("GET", "/v1/ca.pem")
    assert connection.getresponse().read() == proxy.directory.ca_path.read_bytes()
    for path in (PULL, "/v1/control/list-nodes", "/v1/renew", "/v1/ca.key.pem", "/v1/../ca/ca.key.pem", "/"):
        assert proxy.ask(path, None, port=port) == 404


def test_bundle_of_a_revoked_device_opens_neither_proxy_nor_superlink(proxy, superlink):
    (node_id,) = superlink.register("thief").values()
    identity, serial = proxy.create_identity("thief")
    other, _ = proxy.create_identity("device-3")
    standing = proxy.connect(identity)
    standing.request("POST", PULL, b"")
    assert standing.getresponse().read() is not None  # and the connection stays open
    proxy.authority.save_crl([serial])
    proxy.reload()
    wait_until(lambda: proxy.ask(PULL, identity) == 400, timeout_s=60, what="the refusal")
    wait_until(lambda: _is_closed(standing), timeout_s=60, what="the end of what was open")
    assert proxy.ask(PULL, other) != 400
    unregister_nodes(superlink.address, superlink.ca_path, [node_id])
    for address, shown in ((proxy.settings.fleet_address, identity), (superlink.address, None)):
        with pytest.raises(TransientError, match="did not let"):
            join(address, proxy, superlink.node_keys["thief"], shown)


def _is_closed(connection) -> bool:
    connection.sock.settimeout(0.1)
    try:
        return connection.sock.recv(1) == b""
    except TimeoutError:
        return False


def test_node_whose_key_no_member_has_any_more_is_none(superlink):
    superlink.register("before", "stays")
    keys = [superlink.create_key("after")]
    known = list_nodes(superlink.address, superlink.ca_path)
    unregister_others(superlink.address, superlink.ca_path, [*list(known)[1:], *keys])
    left = list_nodes(superlink.address, superlink.ca_path)
    assert set(left) == set(list(known)[1:])


def test_proxy_that_only_this_machine_dials_listens_on_the_loopback_and_another_everywhere(tmp_path):
    proxy = Proxy.create(tmp_path / "federation")
    text = (proxy.directory.proxy_dir / "nginx.conf").read_text()
    assert re.findall(r"listen (\S+) ssl", text) == [
        f"127.0.0.1:{port}" for port in (proxy.settings.proxy.port, proxy.settings.proxy.enrolment_port)
    ]
    shutil.rmtree(proxy.directory.path)


def test_superlink_is_not_put_into_the_network_whatever_the_configuration_says():
    with pytest.raises(ValueError, match=r"superlink\.host is .0\.0\.0\.0., must be .* Control API"):
        SuperLinkSettings(host="0.0.0.0")
    with pytest.raises(ValueError, match=r"proxy\.used is false"):
        ProxySettings(used=False, host="server.example")
