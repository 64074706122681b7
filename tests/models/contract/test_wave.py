from decimal import Decimal

import pytest

from models.contract.wave import Requirements, Traits, Wave, find_unmet, is_in_wave

IDS = [f"device-{number}" for number in range(2000)]
DEVICE = Traits(hardware="aarch64", runtimes=("onnx",), agent="1.9", region="eu")


def test_a_wave_has_about_its_share_of_the_fleet_and_keeps_its_devices_when_it_grows() -> None:
    before: set[str] = set()
    for percentage in (1, 10, 50, 100):
        wave = Wave(key="digits-7", percentage=Decimal(percentage))
        inside = {device for device in IDS if is_in_wave(device, wave)}
        assert before <= inside
        assert abs(len(inside) - 20 * percentage) <= 90  # 4 standard deviations of 2000 draws
        before = inside
    assert len(before) == len(IDS)


def test_another_key_takes_other_devices_first_and_listed_ones_always_come() -> None:
    first, second = (
        {device for device in IDS if is_in_wave(device, Wave(key=key, percentage=Decimal(10)))} for key in ("a", "b")
    )
    assert len(first & second) < 60  # 20 on average
    canary = Wave(key="a", percentage=Decimal(0), devices=("device-3",))
    assert [device for device in IDS if is_in_wave(device, canary)] == ["device-3"]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (Requirements(), None),
        (Requirements(hardware=("x86_64", "aarch64"), agent="1.9.0", regions=("eu",)), None),
        (Requirements(hardware=("x86_64",)), "for hardware x86_64, this is aarch64"),
        (Requirements(agent="1.10"), "needs agent 1.10 or later, this is 1.9"),
        (Requirements(regions=("us", "asia")), "for region us or asia, this is in eu"),
    ],
)
def test_what_a_device_lacks_is_said_in_words(asked: Requirements, reason: str | None) -> None:
    unmet = find_unmet(DEVICE, asked)
    assert unmet is None if reason is None else unmet is not None and reason in unmet


@pytest.mark.parametrize("percentage", ["-1", "101", "NaN", "Infinity"])
def test_a_percentage_beyond_its_range_is_refused(percentage: str) -> None:
    with pytest.raises(ValueError, match=r"must be in 0\.\.100"):
        Wave(key="a", percentage=Decimal(percentage))
