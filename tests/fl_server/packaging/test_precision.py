from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from fl_server.packaging.precision import choose_precision, compute_deviation, measure_figures
from models.contract.manifest import Figures

DATA = Path(__file__).parents[2] / "data"


def figures(size_bytes, row_us):
    return Figures(size_bytes=size_bytes, row_us=Decimal(row_us), batch_us=Decimal(100))


@pytest.mark.parametrize(
    ("float32", "int8", "prefer", "packaged"),
    [
        ((3000, "9"), (1000, "20"), "size", "int8"),
        ((1000, "20"), (3000, "9"), "size", "float32"),
        ((1000, "9"), (1000, "9"), "size", "float32"),
        ((3000, "9"), (1000, "20"), "speed", "float32"),
        ((1000, "20"), (3000, "9"), "speed", "int8"),
        ((3000, "9.0"), (1000, "9.3"), "speed", "int8"),
        ((1000, "9.3"), (3000, "9.0"), "speed", "float32"),
    ],
)
def test_the_smaller_or_the_clearly_faster_graph_is_packaged_as_the_definition_wishes(float32, int8, prefer, packaged):
    measured = choose_precision(figures(*float32), figures(*int8), prefer)
    assert (measured.packaged, measured.prefer) == (packaged, prefer)
    assert (measured.float32.size_bytes, measured.int8.size_bytes) == (float32[0], int8[0])


def test_deviation_is_a_share_of_the_spread_of_the_outputs():
    exact = np.array([[0.0, 2.0], [4.0, 6.0]], np.float32)
    assert compute_deviation(exact, exact) == 0
    assert compute_deviation(exact + np.float32(0.5), exact) == pytest.approx(0.5 / exact.std())
    assert compute_deviation(exact * 10 + 70, exact * 10) == compute_deviation(exact + 7, exact)
    assert np.isnan(compute_deviation(np.full_like(exact, np.nan), exact))


def test_outputs_that_do_not_vary_are_judged_by_their_size():
    constant = np.full((4, 1), 5.0, np.float32)
    assert compute_deviation(constant, constant) == 0
    assert compute_deviation(constant + np.float32(0.005), constant) == pytest.approx(0.1, rel=1e-3)
    assert compute_deviation(np.ones((4, 1)), np.zeros((4, 1))) == float("inf")


def test_figures_of_a_graph_are_its_size_and_positive_medians():
    path = DATA / "tflite-version/inference.tflite"
    found = measure_figures(path, {"image": np.zeros((3, 1, 8, 8), np.float32)})
    assert found.size_bytes == path.stat().st_size
    assert 0 < found.row_us < found.batch_us, "sixteen rows take longer than one"
