"""Parameters as one flat vector and back."""

import numpy as np
import pytest

from models.tensors.layout import Layout, build_vector_bytes, parse_vector_bytes

LAYOUT = Layout(names=("w", "b", "scale"), shapes=((2, 3), (2,), ()))


def test_a_vector_comes_apart_and_together_unchanged() -> None:
    vector = np.arange(LAYOUT.size, dtype=np.float32)
    arrays = LAYOUT.unflatten(vector)
    assert {name: array.shape for name, array in arrays.items()} == {"w": (2, 3), "b": (2,), "scale": ()}
    np.testing.assert_array_equal(LAYOUT.flatten(arrays), vector)


def test_writing_to_an_array_writes_to_the_vector() -> None:
    vector = np.zeros(LAYOUT.size, np.float32)
    LAYOUT.unflatten(vector)["b"][:] = 5
    assert vector[6:8].tolist() == [5, 5]


def test_other_names_and_shapes_are_refused() -> None:
    arrays = LAYOUT.unflatten(np.zeros(LAYOUT.size, np.float32))
    with pytest.raises(ValueError, match="are not"):
        LAYOUT.flatten({"w": arrays["w"]})
    with pytest.raises(ValueError, match="expected"):
        LAYOUT.flatten(arrays | {"w": arrays["w"].T})
    with pytest.raises(ValueError, match="expected"):
        LAYOUT.unflatten(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="each name once"):
        Layout(names=("w", "w"), shapes=((1,), (1,)))


def test_a_vector_travels_as_little_endian_float32() -> None:
    vector = np.array([1, -2.5, np.float32(1e-30)], np.float32)
    data = build_vector_bytes(vector)
    assert data[:8] == bytes.fromhex("0000803f000020c0")
    np.testing.assert_array_equal(parse_vector_bytes(data), vector)
    with pytest.raises(ValueError, match="size"):
        parse_vector_bytes(data[:-1])
