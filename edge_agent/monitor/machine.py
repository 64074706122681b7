"""What this machine says of its power, heat, load and network, read from /sys and /proc; nothing here is kept.

Every function takes the folder that holds both: `/`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BELIEVABLE_C = (0.0, 150.0)  # a sensor that is off says -273, or 0 for ever
_MODEMS = ("wwan", "ppp", "rmnet", "wwp")
_UP = 0x1  # <linux/route.h> RTF_UP


@dataclass(frozen=True, slots=True)
class ProcessorTimes:
    """Since the machine started, over all cores, in ticks.

    Attributes:
        urgent: Of processes that are not niced, and of the kernel.
        total: Idleness included.
    """

    urgent: int
    total: int


def is_on_mains(root: Path) -> bool:
    """Return whether a charger is connected, or there is no battery that powers this machine."""
    kinds = [(supply, _read(supply / "type")) for supply in _list_supplies(root)]
    if any(kind in ("Mains", "USB") and _read(supply / "online") == "1" for supply, kind in kinds):
        return True
    return not any(kind == "Battery" for _, kind in kinds)


def read_battery(root: Path) -> float | None:
    """Return the share of its charge, 0 to 1, of the emptiest battery; None without one."""
    batteries = (supply for supply in _list_supplies(root) if _read(supply / "type") == "Battery")
    shares = [int(found) / 100 for battery in batteries if (found := _read(battery / "capacity")).isdecimal()]
    return min(shares, default=None)


def read_temperature_c(root: Path) -> float | None:
    """Return what the hottest believable sensor says, degrees Celsius; None without one."""
    found = []
    for zone in root.glob("sys/class/thermal/thermal_zone*/temp"):
        try:
            found.append(int(_read(zone)) / 1000)
        except ValueError:  # a sensor that is off answers with an error, or nothing
            continue
    return max((each for each in found if _BELIEVABLE_C[0] < each < _BELIEVABLE_C[1]), default=None)


def read_processor_times(root: Path) -> ProcessorTimes | None:
    """Return the times so far; None if they cannot be read."""
    name, *ticks = _read(root / "proc/stat").split("\n", 1)[0].split()[:9] or ("",)
    if name != "cpu" or len(ticks) != 8:
        return None
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, ticks)
    urgent = user + system + irq + softirq + steal
    return ProcessorTimes(urgent, urgent + nice + idle + iowait)


def compute_load(before: ProcessorTimes | None, after: ProcessorTimes | None) -> float | None:
    """Return the share of all processor time that urgent processes took between the two, 0 to 1; None if unknown."""
    if before is None or after is None or after.total <= before.total:
        return None
    return (after.urgent - before.urgent) / (after.total - before.total)


def is_metered(root: Path, interfaces: tuple[str, ...]) -> bool:
    """Return whether the way out leads through a modem, or one of `interfaces`."""
    return any(name in interfaces or name.startswith(_MODEMS) for name in _list_ways_out(root))


def _list_ways_out(root: Path) -> Iterator[str]:
    """Yield the interfaces of default routes."""
    for line in _read(root / "proc/net/route").splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == fields[7] == "00000000" and int(fields[3], 16) & _UP:
            yield fields[0]
    for line in _read(root / "proc/net/ipv6_route").splitlines():
        fields = line.split()
        if len(fields) > 9 and fields[1] == "00" and int(fields[8], 16) & _UP and fields[9] != "lo":
            yield fields[9]


def _list_supplies(root: Path) -> Iterator[Path]:
    """Yield what powers this machine: not the batteries of a mouse."""
    for supply in root.glob("sys/class/power_supply/*"):
        if _read(supply / "scope") != "Device":
            yield supply


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
