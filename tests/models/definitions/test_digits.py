import numpy as np
import pytest
import torch

from models.definitions.digits import DEVICE_MIN_SAMPLES, definition, load_splits


def test_module_takes_raw_pixels_of_the_stated_shape():
    output = definition.build()(torch.full((3, *definition.inputs[0].row_shape), 16.0))
    assert output.shape == (3, *definition.outputs[0].row_shape)
    assert len(definition.labels) == 10


def test_every_digit_is_in_exactly_one_part():
    splits = load_splits(devices=8, seed=3)
    parts = [splits.test, splits.validation, *splits.devices]
    assert [len(part.y) for part in parts[:2]] == [300, 200]
    assert sum(len(part.y) for part in parts) == 1797
    assert all(part.x.shape == (len(part.y), 1, 8, 8) for part in parts)
    assert all(part.x.dtype == np.float32 and part.y.dtype == np.int64 for part in parts)
    assert min(part.x.min() for part in parts) == 0
    assert max(part.x.max() for part in parts) == 16


def test_same_seed_gives_the_same_splits_and_another_does_not():
    one, same, other = (load_splits(devices=4, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a.x, b.x) for a, b in zip(one.devices, same.devices, strict=True))
    assert np.array_equal(one.test.y, same.test.y)
    assert not np.array_equal(one.test.y, other.test.y)


@pytest.mark.parametrize("devices", [1, 30, 64])
def test_every_device_has_enough_samples_however_uneven_the_draw(devices):
    splits = load_splits(devices=devices, seed=0, alpha=0.05)
    assert min(len(device.y) for device in splits.devices) >= DEVICE_MIN_SAMPLES
    assert sum(len(device.y) for device in splits.devices) == 1297


def test_low_alpha_makes_labels_uneven():
    even, uneven = (load_splits(devices=4, seed=0, alpha=alpha) for alpha in (100.0, 0.05))

    def largest_share(splits):
        return np.mean([np.bincount(device.y, minlength=10).max() / len(device.y) for device in splits.devices])

    assert largest_share(uneven) > largest_share(even) + 0.05


@pytest.mark.parametrize("devices", [0, 65])
def test_more_devices_than_digits_suffice_for_are_refused(devices):
    with pytest.raises(ValueError, match="suffice for 1 to 64"):
        load_splits(devices=devices, seed=0)
