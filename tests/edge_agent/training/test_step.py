"""The step that training drives, over both engines: the step graph in onnxruntime, and Opacus on a definition."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge_agent.errors import EngineError, StalledError
from edge_agent.training.step import open_step
from models.contract.manifest import EVALUATE_NAME, TRAIN_STEP_NAME
from models.definitions import opacus_step
from tests.simulators.linear import open_opacus_step, save_opacus_version
from tests.simulators.step_graph import (
    FAULTS,
    build_step_graph,
    clipped_sum_in_numpy,
    open_onnx_step,
    save_step_version,
)

PARAMETERS = np.array([0.5, -1.0, 2.0, 0.1], np.float32)
OPENERS = {"onnx": open_onnx_step, "opacus": open_opacus_step}
STEPS = {engine: open_one()[0] for engine, open_one in OPENERS.items()}

both_engines = pytest.mark.parametrize("engine", OPENERS)


def draw_samples(count, seed=0):
    generator = np.random.default_rng(seed)
    return (
        generator.normal(0, 2, (count, 3)).astype(np.float32),
        generator.normal(0, 2, count).astype(np.float32),
    )


@both_engines
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 37])
def test_sums_of_any_number_of_rows_equal_clipping_in_numpy(engine, count):
    x, y = draw_samples(count)
    expected = clipped_sum_in_numpy(x, y, 1.5, PARAMETERS)
    np.testing.assert_allclose(STEPS[engine].clipped_sum(x, y, 1.5, PARAMETERS), expected, atol=1e-5)


numbers = st.floats(width=32, allow_nan=True, allow_infinity=True)


@both_engines
@settings(max_examples=60, deadline=None)
@given(
    x=arrays(np.float32, (3,), elements=numbers),
    y=numbers,
    others_x=arrays(np.float32, (3,), elements=numbers),
    others_y=numbers,
)
def test_one_sample_moves_the_sum_by_no_more_than_the_clipping_norm(engine, x, y, others_x, others_y):
    kept_x, kept_y = draw_samples(10)
    sums = []
    for extra_x, extra_y in (([], []), ([x], [y]), ([others_x], [others_y])):
        rows = np.concatenate([kept_x, np.array(extra_x, np.float32).reshape(-1, 3)])
        targets = np.concatenate([kept_y, np.array(extra_y, np.float32)])
        sums.append(STEPS[engine].clipped_sum(rows, targets, 1, PARAMETERS))
    without, with_it, replaced = sums
    assert np.linalg.norm(with_it - without) <= 1 + 1e-4
    assert np.linalg.norm(replaced - with_it) <= 2 * (1 + 1e-4)


@both_engines
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_sample_without_finite_gradient_adds_nothing(engine, bad):
    x, y = draw_samples(20)
    expected = clipped_sum_in_numpy(np.delete(x, 5, 0), np.delete(y, 5), 1, PARAMETERS)
    x[5] = bad
    np.testing.assert_allclose(STEPS[engine].clipped_sum(x, y, 1, PARAMETERS), expected, atol=1e-5)


@both_engines
def test_label_out_of_range_adds_nothing_and_is_not_quoted(engine, capfd):
    step, _ = OPENERS[engine](labels=True)
    x, _ = draw_samples(20)
    y = np.arange(20) % 2
    expected = step.clipped_sum(np.delete(x, 5, 0), np.delete(y, 5), 1, PARAMETERS)
    y[5] = 424242
    np.testing.assert_allclose(step.clipped_sum(x, y, 1, PARAMETERS), expected, atol=1e-5)
    assert "424242" not in "".join(capfd.readouterr())


@both_engines
def test_parameters_that_diverged_leave_only_noise(engine):
    x, y = draw_samples(20)
    np.testing.assert_array_equal(STEPS[engine].clipped_sum(x, y, 1, np.full(4, np.inf, np.float32)), np.zeros(4))


@pytest.mark.parametrize(("engine", "times"), [("onnx", 20), ("opacus", 5)])
def test_honest_step_always_opens(engine, times):
    for _ in range(times):
        OPENERS[engine]()
        OPENERS[engine](labels=True)
        OPENERS[engine](batch=1)


@pytest.mark.parametrize("fault", FAULTS)
def test_graph_that_does_not_bound_a_sample_is_refused(fault):
    for _ in range(20):  # whatever the random data
        with pytest.raises(StalledError, match="does not clip"):
            open_onnx_step(factor=FAULTS[fault])


take, add_up = opacus_step._take_gradients, opacus_step._sum_clipped
OPACUS_FAULTS = {
    "ignores the clip": ("_sum_clipped", lambda found, mask, norm: add_up(found, mask, 1e9 * norm)),
    "clips at five times the norm": ("_sum_clipped", lambda found, mask, norm: add_up(found, mask, 5 * norm)),
    "ignores the mask": ("_sum_clipped", lambda found, mask, norm: add_up(found, mask + 1, norm)),
    "clips each parameter alone": (
        "_sum_clipped",
        lambda found, mask, norm: (*(add_up([one], mask, norm)[0] for one in found), add_up(found, mask, norm)[-1]),
    ),
    "mixes samples": ("_take_gradients", lambda *feeds: [3 * one.mean(0) - one for one in take(*feeds)]),
}


@pytest.mark.parametrize("fault", OPACUS_FAULTS)
def test_opacus_that_does_not_bound_a_sample_is_refused(monkeypatch, fault):
    monkeypatch.setattr(opacus_step, *OPACUS_FAULTS[fault])
    with pytest.raises(StalledError, match="does not clip"):
        open_opacus_step()


def test_graph_on_disk_must_be_the_manifests(tmp_path):
    manifest = save_step_version(tmp_path, build_step_graph())
    assert open_step(tmp_path, manifest).size == 4
    (tmp_path / TRAIN_STEP_NAME).write_bytes(build_step_graph(factor=FAULTS["ignores the clip"]))
    with pytest.raises(StalledError, match="digest"):
        open_step(tmp_path, manifest)
    (tmp_path / TRAIN_STEP_NAME).unlink()
    with pytest.raises(StalledError, match="No such file"):
        open_step(tmp_path, manifest)


def test_what_is_no_graph_or_has_other_inputs_is_refused(tmp_path):
    for graph, reason in (
        (b"not a graph", "does not open"),
        (build_step_graph().replace(b"mask", b"mark"), "has inputs"),
    ):
        with pytest.raises(StalledError, match=reason):
            open_step(tmp_path, save_step_version(tmp_path, graph))


@pytest.mark.parametrize(("kind", "shape"), [(onnx.TensorProto.DOUBLE, [3]), (onnx.TensorProto.FLOAT, [4])])
def test_graph_whose_sums_would_not_fit_where_they_are_written_is_refused(tmp_path, kind, shape):
    model = onnx.load_from_string(build_step_graph())
    (node,) = (node for node in model.graph.node if "weight_sum" in node.output)
    node.output[0] = "as_it_was"
    if kind == onnx.TensorProto.DOUBLE:
        model.graph.node.append(onnx.helper.make_node("Cast", ["as_it_was"], ["weight_sum"], to=kind))
    else:
        model.graph.node.append(onnx.helper.make_node("Concat", ["as_it_was", "bias"], ["weight_sum"], axis=0))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("weight_sum", kind, shape))
    with pytest.raises(StalledError, match="returns weight_sum"):
        open_step(tmp_path, save_step_version(tmp_path, model.SerializeToString()))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "features_200",
            r"has parameter \('weight', \(1, 200\)\) where version 1 of 'linear' has \('weight', \(1, 3\)\)",
        ),
        ("without_bias_3", r"has parameter None where version 1 of 'linear' has \('bias', \(1,\)\)"),
        ("doubled_3", r"does not compute what evaluate\.onnx of version 1 of 'linear' does"),
        ("labelled_3", r"federation\.definition: IndexError"),
        ("number", r"is of type int, expected ModelDefinition"),
        ("missing", r"has no 'missing'"),
    ],
)
def test_definition_that_is_not_the_signed_model_is_refused_in_one_line(tmp_path, name, reason):
    manifest = save_opacus_version(tmp_path)
    assert open_step(tmp_path, manifest, "tests.simulators.linear:features_3").size == 4
    with pytest.raises(EngineError, match=reason) as caught:
        open_step(tmp_path, manifest, f"tests.simulators.linear:{name}")
    assert "\n" not in str(caught.value)


def test_evaluation_graph_that_was_exchanged_is_no_witness(tmp_path):
    manifest = save_opacus_version(tmp_path)
    with (tmp_path / EVALUATE_NAME).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(StalledError, match="digest"):
        open_step(tmp_path, manifest, "tests.simulators.linear:features_3")
