import numpy as np
import pytest

from fl_server.errors import UsageError
from fl_server.held_out import load_held_out
from models.tensors.features import Feature, build_inputs
from models.tensors.spec import TensorSpec

SPEC = TensorSpec("point", ("batch", 2), "float32")
X = np.arange(6, dtype=np.float64).reshape(3, 2)


def test_rows_come_in_the_dtype_of_the_input(tmp_path):
    np.savez(tmp_path / "data.npz", x=X, y=np.arange(3))
    data = load_held_out(tmp_path / "data.npz", SPEC)
    assert (data.x.dtype, data.x.shape, data.y.tolist()) == (np.float32, (3, 2), [0, 1, 2])


FEATURES = (Feature("age", scale=(50, 10)), Feature("town", one_hot=("Ulm",)))


def test_columns_become_the_input_as_on_a_device(tmp_path):
    np.savez(tmp_path / "data.npz", age=np.array([50, 61]), town=np.array(["Ulm", "Bonn"]), y=np.arange(2))
    data = load_held_out(tmp_path / "data.npz", SPEC, FEATURES)
    rows = [{"age": "50", "town": "Ulm"}, {"age": 61.0, "town": "Bonn"}]
    assert data.x.tobytes() == build_inputs(FEATURES, (SPEC,), rows)["point"].tobytes()
    np.savez(tmp_path / "data.npz", x=X)
    assert load_held_out(tmp_path / "data.npz", SPEC, FEATURES).x.tolist() == X.tolist()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"age": np.arange(2)}, "row 0: column 'town' is missing"),
        ({"age": np.arange(2), "town": np.array(["Ulm"])}, "columns of one length"),
        ({"age": np.zeros((2, 2)), "town": np.zeros((2, 2))}, "columns of one length"),
        ({"z": np.arange(2)}, "columns of one length"),
        ({"age": np.array([np.inf]), "town": np.array(["Ulm"])}, "column 'age': expected a finite number"),
    ],
)
def test_columns_of_no_use_are_refused_in_words(tmp_path, arrays, words):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(UsageError, match=words):
        load_held_out(tmp_path / "data.npz", SPEC, FEATURES)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": X[:, :1]}, "x has shape"),
        ({"x": X[:0]}, "x has shape"),
        ({"x": np.float32(3)}, "x has shape"),
        ({"x": X, "y": np.arange(2)}, "y has shape"),
        ({"x": X, "y": np.float32(3)}, "y has shape"),
        ({"x": np.array([["a", "b"]])}, "is float32"),
        ({"x": X * np.nan}, "x holds NaN"),
        ({"x": X, "y": np.full(3, np.inf)}, "y holds NaN"),
        ({"y": np.arange(3)}, "no array x"),
        ({"x": np.array([[object(), 1]])}, "no npz file"),
    ],
)
def test_data_that_fits_no_model_is_refused_in_words(tmp_path, arrays, words):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(UsageError, match=words):
        load_held_out(tmp_path / "data.npz", SPEC)


def test_file_that_is_no_npz_is_refused_in_words(tmp_path):
    np.save(tmp_path / "array.npy", X)
    np.savez_compressed(tmp_path / "whole.npz", x=np.random.default_rng(0).normal(size=(300, 2)))
    damaged = bytearray((tmp_path / "whole.npz").read_bytes())
    damaged[200:240] = b"\xff" * 40
    (tmp_path / "damaged.npz").write_bytes(damaged)
    (tmp_path / "empty.npz").touch()
    for name in ("array.npy", "damaged.npz", "empty.npz", "absent.npz"):
        with pytest.raises(UsageError, match=name):
            load_held_out(tmp_path / name, SPEC)
