"""Power, heat, load and network as Linux shows them, in folders laid out like its own."""

from pathlib import Path

import pytest

from edge_agent.monitor import machine

ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
LOCAL = "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
ZERO = "0" * 32


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def build_supply(name: str, **files: str) -> dict[str, str]:
    return {f"sys/class/power_supply/{name}/{key}": f"{value}\n" for key, value in files.items()}


@pytest.mark.parametrize(
    ("supplies", "is_on_mains", "battery"),
    [
        ({}, True, None),
        (build_supply("AC", type="Mains", online="1") | build_supply("B", type="Battery", capacity="7"), True, 0.07),
        (build_supply("AC", type="Mains", online="0") | build_supply("B", type="Battery", capacity="93"), False, 0.93),
        (
            build_supply("B0", type="Battery", capacity="40") | build_supply("B1", type="Battery", capacity="60"),
            False,
            0.4,
        ),
        (build_supply("mouse", type="Battery", capacity="3", scope="Device"), True, None),
        (build_supply("usb", type="USB", online="1") | build_supply("B", type="Battery"), True, None),
    ],
)
def test_power_is_mains_unless_only_a_battery_feeds_the_machine(
    tmp_path: Path, supplies: dict[str, str], *, is_on_mains: bool, battery: float | None
) -> None:
    root = lay_out(tmp_path, supplies)
    assert (machine.is_on_mains(root), machine.read_battery(root)) == (is_on_mains, battery)


def test_temperature_is_that_of_the_hottest_believable_sensor(tmp_path: Path) -> None:
    assert machine.read_temperature_c(tmp_path) is None
    zones = {"0": "45500\n", "1": "71000\n", "2": "-274000\n", "3": "", "4": "999999\n"}
    lay_out(tmp_path, {f"sys/class/thermal/thermal_zone{zone}/temp": text for zone, text in zones.items()})
    assert machine.read_temperature_c(tmp_path) == 71.0


def test_load_counts_what_is_not_niced(tmp_path: Path) -> None:
    assert machine.compute_load(None, machine.read_processor_times(tmp_path)) is None
    before = machine.read_processor_times(lay_out(tmp_path, {"proc/stat": "cpu  10 10 10 10 10 0 0 0 0 0\ncpu0 1\n"}))
    after = machine.read_processor_times(lay_out(tmp_path, {"proc/stat": "cpu  25 70 20 30 15 2 2 1 9 9\ncpu0 1\n"}))
    assert machine.compute_load(before, after) == 30 / (165 - 50)
    assert machine.compute_load(after, after) is None
    assert machine.read_processor_times(lay_out(tmp_path, {"proc/stat": "junk\n"})) is None


def test_this_machine_can_be_read() -> None:
    times = machine.read_processor_times(Path("/"))
    assert times is not None
    assert 0 < times.urgent <= times.total
    machine.is_metered(Path("/"), ())
    machine.is_on_mains(Path("/"))


@pytest.mark.parametrize(
    ("routes", "metered"),
    [
        ("", False),
        (f"{ROUTES}eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n{LOCAL}", False),
        (f"{ROUTES}wwan0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n{LOCAL}", True),
        (f"{ROUTES}wlan7\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n", True),
        (f"{ROUTES}{LOCAL.replace('eth0', 'wwan0')}", False),
    ],
)
def test_way_out_over_a_modem_or_a_named_interface_is_metered(tmp_path: Path, routes: str, *, metered: bool) -> None:
    assert machine.is_metered(lay_out(tmp_path, {"proc/net/route": routes}), ("wlan7",)) is metered


def test_way_out_of_version_6_counts_too(tmp_path: Path) -> None:
    line = f"{ZERO} 00 {ZERO} 00 fe80 00000400 00000001 00000000 {{flags}} {{name}}\n"
    for name, flags, metered in (("ppp0", "00000003", True), ("eth0", "00000003", False), ("ppp0", "00000000", False)):
        root = lay_out(tmp_path, {"proc/net/ipv6_route": line.format(flags=flags, name=name)})
        assert machine.is_metered(root, ()) is metered
