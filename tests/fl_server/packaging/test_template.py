"""When the champion's scales are kept, and that what is kept is the same file to the byte."""

import io
import logging
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from fl_server.packaging.graphs import build_with_parameters, load_graph
from fl_server.packaging.package import Tools, package_version
from fl_server.packaging.quantize import prepare_graph, quantize
from fl_server.packaging.template import MisfitError, build_weights, explain_renewal, split_weights
from models.contract.manifest import WEIGHTS_NAME, Lineage
from models.tensors.delta import apply_delta
from tests.fl_server.packaging.test_package import measure_int8_smaller

FITS = {"weight_clipping": 0.02, "activation_clipping": 0.02, "deviation": 0.1, "tolerance": 0.1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"weight_clipping": 0.021}, "2.1% of the weights lie beyond the champion's scales, 2% may"),
        ({"activation_clipping": 0.5}, "50.0% of an activation lie beyond the champion's scales, 2% may"),
        ({"deviation": 0.101}, "with the champion's scales the outputs stray by 0.101 of their spread"),
        ({"deviation": float("nan")}, "stray by nan"),
        ({"weight_clipping": float("nan")}, "nan% of the weights"),
    ],
)
def test_scales_are_renewed_for_weights_activations_or_outputs_that_leave_them(change, said):
    reason = explain_renewal(**(FITS | change))
    assert said in reason
    assert bool(reason) == bool(said)


def package(exported, out_dir, parameters, *, running=(), scale=1.0, architecture=None):
    return package_version(
        architecture or exported.architecture,
        parameters=parameters,
        version=1 + len(running),
        calibration=exported.build_data(1, scale)[0],
        tools=Tools(measure=lambda *_: None, measure_figures=measure_int8_smaller, running=running),
        lineage=Lineage(),
        privacy=None,
        out_dir=out_dir,
    )


def nudge(parameters, share):
    """Return parameters a little closer to zero, so that none leaves its scale."""
    return {name: (array * (1 - share)).astype(np.float32) for name, array in parameters.items()}


def read_delta(manifest, directory, base_dir):
    """Return what the delta of the version in `directory` makes of the weights in `base_dir`."""
    (delta,) = manifest.deltas
    data = (directory / delta.name).read_bytes()
    with (base_dir / WEIGHTS_NAME).open("rb") as base:
        size = manifest.files[WEIGHTS_NAME].size_bytes
        return b"".join(apply_delta(base, data, size_bytes=size, block_bytes=1 << 16))


def test_version_close_to_the_champion_keeps_its_template_and_is_a_delta_away(exported, tmp_path):
    parameters = exported.build_parameters(0)
    champion = package(exported, tmp_path / "1", parameters)
    manifest = package(exported, tmp_path / "2", nudge(parameters, 0.02), running=[tmp_path / "1"])
    assert manifest.files["inference.onnx"] == champion.files["inference.onnx"]
    assert manifest.files[WEIGHTS_NAME] != champion.files[WEIGHTS_NAME]
    assert manifest.measured.packaged == "int8"
    assert read_delta(manifest, tmp_path / "2", tmp_path / "1") == (tmp_path / "2" / WEIGHTS_NAME).read_bytes()

    again = package(exported, tmp_path / "3", parameters, running=[tmp_path / "1"])
    assert again.files == champion.files, "the same parameters in the same scales"
    assert again.deltas == ()


def test_template_with_its_weights_answers_as_the_int8_graph_that_it_was(exported, tmp_path):
    graph = build_with_parameters(load_graph(exported.architecture.float_path), exported.build_parameters(0))
    x, quantization = exported.build_data(1)[0], exported.architecture.quantization
    quantize(graph, x, quantization, tmp_path / "whole.onnx")
    template, weights = split_weights(load_graph(tmp_path / "whole.onnx"), prepare_graph(graph, quantization))
    assert build_weights(template, prepare_graph(graph, quantization)) == (weights, 0.0)
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        whole = ort.InferenceSession(tmp_path / "whole.onnx", options)
        options.add_external_initializers_from_files_in_memory([WEIGHTS_NAME], [weights], [len(weights)])
        split = ort.InferenceSession(template.SerializeToString(), options)
        np.testing.assert_array_equal(*(session.run(None, {"features": x})[0] for session in (whole, split)))


def test_weights_that_outgrow_their_scales_are_clipped_at_seven_bits(exports, tmp_path):
    exported = exports("mlp")
    graph = build_with_parameters(load_graph(exported.architecture.float_path), exported.build_parameters(0))
    quantize(graph, exported.build_data(1)[0], "static", tmp_path / "int8.onnx")
    template, _ = split_weights(load_graph(tmp_path / "int8.onnx"), prepare_graph(graph, "static"))
    grown = build_with_parameters(graph, nudge(exported.build_parameters(0), -2.0))
    weights, clipped = build_weights(template, prepare_graph(grown, "static"))
    codes = np.frombuffer(weights, np.int8)[-(16 * 13 + 3 * 16) :]  # behind the biases, which are longer
    assert (codes.min(), codes.max()) == (-64, 64)
    assert 0.2 < clipped < 1


@pytest.mark.parametrize("name", ["mlp", "text", "sequence"])
def test_parameters_that_outgrow_the_scales_are_calibrated_anew(exports, tmp_path, caplog, name):
    exported = exports(name)
    parameters = exported.build_parameters(0)
    champion = package(exported, tmp_path / "1", parameters)
    caplog.set_level(logging.INFO)
    grown = package(exported, tmp_path / "2", nudge(parameters, -1.0), running=[tmp_path / "1"])
    assert f"{name} gets scales of its own" in caplog.text
    assert grown.files["inference.onnx"] != champion.files["inference.onnx"]
    assert grown.deltas == ()
    fresh = package(exported, tmp_path / "3", nudge(parameters, -1.0))
    assert grown.files == fresh.files


def test_inputs_that_outgrow_the_activations_scales_are_enough(exports, tmp_path, caplog):
    exported = exports("mlp")
    parameters = exported.build_parameters(0)
    package(exported, tmp_path / "1", parameters)
    caplog.set_level(logging.INFO)
    package(exported, tmp_path / "2", parameters, running=[tmp_path / "1"], scale=3.0)
    assert "of an activation lie beyond the champion's scales" in caplog.text


def test_champion_of_another_architecture_or_without_weights_lends_nothing(exports, tmp_path):
    mlp, text = exports("mlp"), exports("text")
    package(text, tmp_path / "text", text.build_parameters(0))
    parameters = mlp.build_parameters(0)
    fresh = package(mlp, tmp_path / "fresh", parameters)
    assert package(mlp, tmp_path / "2", parameters, running=[tmp_path / "text"]).files == fresh.files

    def measure_float_smaller(path, rows):
        return replace(measure_int8_smaller(path, rows), size_bytes=1 if path.name == "float.onnx" else 2)

    tools = Tools(measure=lambda *_: None, measure_figures=measure_float_smaller)
    arguments = {"calibration": mlp.build_data(1)[0], "lineage": Lineage(), "privacy": None, "parameters": parameters}
    whole = package_version(mlp.architecture, version=1, tools=tools, out_dir=tmp_path / "whole", **arguments)
    assert WEIGHTS_NAME not in whole.files
    assert package(mlp, tmp_path / "3", parameters, running=[tmp_path / "whole"]).files == fresh.files


def test_template_of_another_graph_is_a_misfit(exports):
    graphs = {}
    for name in ("mlp", "cnn", "sequence"):
        exported = exports(name)
        graph = build_with_parameters(load_graph(exported.architecture.float_path), exported.build_parameters(0))
        graphs[name] = prepare_graph(graph, "static")
    template, _ = split_weights(graphs["cnn"], graphs["cnn"])
    for name in ("mlp", "sequence"):
        with pytest.raises(MisfitError):
            build_weights(template, graphs[name])
    changed = onnx.ModelProto()
    changed.CopyFrom(graphs["cnn"])
    scalar = next(tensor for tensor in changed.graph.initializer if not tensor.dims)
    scalar.CopyFrom(onnx.numpy_helper.from_array(np.float32(7), scalar.name))
    with pytest.raises(MisfitError, match="is another constant"):
        build_weights(template, changed)


def test_delta_leads_from_each_version_that_devices_run(exports, tmp_path):
    exported = exports("sequence")
    parameters = exported.build_parameters(0)
    for number, running in ((1, []), (2, [1]), (3, [2, 1])):
        directories = [tmp_path / str(each) for each in running]
        changed = nudge(parameters, 0.02 * number)
        manifest = package(exported, tmp_path / str(number), changed, running=directories)
    result = (tmp_path / "3" / WEIGHTS_NAME).read_bytes()
    assert len(manifest.deltas) == 2
    for delta, directory in zip(manifest.deltas, directories, strict=True):
        base = io.BytesIO((directory / WEIGHTS_NAME).read_bytes())
        data = (tmp_path / "3" / delta.name).read_bytes()
        assert b"".join(apply_delta(base, data, size_bytes=len(result), block_bytes=100)) == result
