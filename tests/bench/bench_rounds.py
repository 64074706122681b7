"""A round without training, its messages and checkpoints only, beside the SuperLink's bare request time.

Once more through the proxy as shipped, each device with its certificate; loopback, so the network's own time is none.

The floor is what the requests of one round take when one client sends them one after the other:
a node needs 4 (ask, parameters, announce, update), the driver 1 for its reply.
Stock Flower cannot be faster than 6 s: each side sleeps 3 s between looks.
"""

import statistics
import tempfile
import time
from pathlib import Path

import psutil

from fl_server.demo.processes import find_nginx
from fl_server.errors import ServerError
from fl_server.rounds.flower import Session
from fl_server.rounds.quorum import choose_poll_interval_s
from tests.simulators.nginx import Proxy
from tests.simulators.superlink import Fleet, SuperLink, running_fleet

PARAMETERS = 100_000  # 400 kB
ROUNDS = 7  # the first also waits for processes that have just joined
REQUESTS_PER_NODE = 5
FLOOR_REQUESTS = 100
BUDGET_PER_S = 40.0
STOCK_FLOOR_S = 6.0
PROXIED_NODES = 10


def run() -> dict[str, float]:
    figures: dict[str, float] = {}
    for nodes in (3, 8):
        figures.update(measure_rounds(nodes))
    try:
        find_nginx()
    except ServerError as error:
        print(f"no rounds through the proxy: {error}")
    else:
        figures.update(measure_proxied(PROXIED_NODES))
    return figures


def measure_rounds(count: int) -> dict[str, float]:
    interval_s = choose_poll_interval_s(devices=count, budget_per_s=BUDGET_PER_S)
    with tempfile.TemporaryDirectory() as directory, running_fleet(Path(directory)) as fleet:
        devices = fleet.superlink.register(*(f"device-{number}" for number in range(count)))
        floor_s = measure_request_s(fleet) * REQUESTS_PER_NODE * count
        nodes = [fleet.start_node(name, poll_s=interval_s) for name in devices]
        for node in nodes:
            assert node.next_line() == b"joined\n"
        driver = fleet.start_driver(fleet.create_run(devices, size=PARAMETERS, rounds=ROUNDS))
        events = driver.run_to_end(timeout_s=120)
        seconds = [event.seconds for event in events if event.event == "round"][1:]
        resident = max(psutil.Process(node.pid).memory_info().rss for node in nodes)
    assert [event.event for event in events] == ["joined", *["round"] * ROUNDS, "done"]
    median_s = statistics.median(seconds)
    return {
        f"round_{count}_nodes_s": median_s,
        f"round_{count}_nodes_worst_s": max(seconds),
        f"round_{count}_nodes_to_bare_requests_ratio": median_s / floor_s,
        f"round_{count}_nodes_to_stock_floor_ratio": median_s / STOCK_FLOOR_S,
        f"polls_of_{count}_nodes_per_s": count / interval_s,
        f"node_of_{count}_resident_mb": resident / 1e6,
    }


def measure_proxied(count: int) -> dict[str, float]:
    """Return rounds of `count` devices that come through the TLS proxy."""
    interval_s = choose_poll_interval_s(devices=count, budget_per_s=BUDGET_PER_S)
    with tempfile.TemporaryDirectory() as name, Proxy.create(Path(name) / "federation") as proxy:
        secret_path = proxy.directory.ca_dir / "secret"
        secret_path.write_text("0123456789abcdef" * 4)
        superlink = SuperLink(directory=proxy.directory.ca_dir, port=proxy.settings.superlink.port)
        superlink.start()
        fleet = Fleet(superlink, Path(name))
        try:
            devices = superlink.register(*(f"device-{number}" for number in range(count)))
            nodes = [
                fleet.start_node(
                    device,
                    poll_s=interval_s,
                    address=proxy.settings.fleet_address,
                    identity=proxy.create_identity(device)[0],
                )
                for device in devices
            ]
            for node in nodes:
                assert node.next_line() == b"joined\n"
            driver = fleet.start_driver(fleet.create_run(devices, size=PARAMETERS, rounds=ROUNDS))
            seconds = [event.seconds for event in driver.run_to_end(timeout_s=120) if event.event == "round"]
        finally:
            fleet.close()
            superlink.kill()
    assert len(seconds) == ROUNDS
    return {
        f"round_{count}_nodes_through_proxy_s": statistics.median(seconds[1:]),
        f"round_{count}_nodes_through_proxy_worst_s": max(seconds[1:]),
    }


def measure_request_s(fleet) -> float:
    """Return what one small request to an idle SuperLink takes."""
    link = fleet.superlink
    with Session(address=link.address, ca_path=link.ca_path, superexec_secret_path=link.secret_path, size=1) as session:
        session.list_online()
        started = time.perf_counter()
        for _ in range(FLOOR_REQUESTS):
            session.list_online()
        return (time.perf_counter() - started) / FLOOR_REQUESTS
