"""What a TFLite graph answers on a device, and what is said of graphs and runtimes that do not work."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from edge_agent.errors import RequestError, StalledError
from edge_agent.inference.model import load_version
from edge_agent.inference.tflite_backend import TfliteBackend
from tests.simulators.environments import prepare_python

DATA = Path(__file__).parents[2] / "data"
VERSION_DIR = DATA / "tflite-version"
GRAPH = VERSION_DIR / "inference.tflite"
OLDER_DIR = Path(__file__).parents[2] / "simulators" / "older_tflite"
STEP = 0.0084  # of the int8 outputs: other kernels may round one value in a hundred the other way
LITERT, OLDER = "ai_edge_litert.interpreter", "tflite_runtime.interpreter"


@pytest.fixture(scope="module")
def expected():
    with np.load(DATA / "tflite-version.npz") as arrays:
        return dict(arrays)


def save_cast(path: Path, *, batch: int) -> Path:
    """Save a graph without a signature that makes int32 "ids" of (rows, 2) float32 "numbers"; batch -1 is free."""
    tensors = []
    for name, dtype in (("ids", schema.TensorType.INT32), ("numbers", schema.TensorType.FLOAT32)):
        tensor = schema.TensorT()
        tensor.name, tensor.type, tensor.buffer = name, dtype, 0
        tensor.shape, tensor.shapeSignature = [max(batch, 1), 2], [batch, 2]
        tensors.append(tensor)
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CAST
    cast = schema.OperatorT()
    cast.opcodeIndex, cast.inputs, cast.outputs = 0, [0], [1]
    subgraph = schema.SubGraphT()
    subgraph.tensors, subgraph.inputs, subgraph.outputs, subgraph.operators = tensors, [0], [1], [cast]
    model = schema.ModelT()
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [subgraph], [schema.BufferT()]
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(builder.Output())
    return path


def test_tflite_version_answers_as_on_the_server(expected) -> None:
    model = load_version(VERSION_DIR)
    for rows in (1, 7, 32):
        outputs = model.infer({"image": expected["image"][:rows]})
        np.testing.assert_allclose(outputs["logits"], expected["logits"][:rows], atol=1e-5)
    assert not model.batching_pays


def test_tensors_are_named_as_in_the_signature() -> None:
    backend = TfliteBackend(GRAPH)
    assert (backend.input_names, backend.output_names) == (["image"], ["logits"])


def test_several_threads_share_a_graph(expected) -> None:
    backend = TfliteBackend(GRAPH)
    rows = list(range(32)) * 20
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda row: backend.run({"image": expected["image"][row : row + 1]})[0], rows))
    np.testing.assert_allclose(np.concatenate(answers), expected["logits"][rows], atol=1e-5)


def test_answer_does_not_change_with_the_next_one(expected) -> None:
    backend = TfliteBackend(GRAPH)
    (first,) = backend.run({"image": expected["image"][:1]})
    kept = first.copy()
    backend.run({"image": expected["image"][1:2]})
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("batch", [-1, 1])
def test_int64_becomes_the_int32_of_a_graph_with_any_batch(tmp_path: Path, batch: int) -> None:
    backend = TfliteBackend(save_cast(tmp_path / "cast.tflite", batch=batch))
    assert (backend.input_names, backend.output_names) == (["ids"], ["numbers"])
    for rows in (1, 3, 1, 16):
        ids = np.arange(2 * rows).reshape(rows, 2)
        (numbers,) = backend.run({"ids": ids})
        assert numbers.dtype == np.float32
        np.testing.assert_array_equal(numbers, ids)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"ids": np.array([[2**31, 0]])}, "does not fit into int32"),
        ({"ids": np.zeros((1, 2), np.float32)}, "FLOAT32"),
        ({"ids": np.zeros((1, 3), np.int32)}, "dimension 1|unknown dimensions"),
        ({"other": np.zeros((1, 2), np.int32)}, "ids"),
    ],
)
@pytest.mark.parametrize("batch", [-1, 1])
def test_inputs_that_a_graph_cannot_take_are_refused_and_it_answers_on(
    tmp_path: Path, batch: int, inputs: dict, said: str
) -> None:
    backend = TfliteBackend(save_cast(tmp_path / "cast.tflite", batch=batch))
    with pytest.raises(RequestError, match=said):
        backend.run(inputs)
    np.testing.assert_array_equal(backend.run({"ids": np.array([[5, 6]])})[0], [[5, 6]])


def test_graph_of_another_fixed_batch_is_refused(tmp_path: Path) -> None:
    backend = TfliteBackend(save_cast(tmp_path / "cast.tflite", batch=4))
    with pytest.raises(RequestError, match="expected 4"):
        backend.run({"ids": np.zeros((1, 2), np.int32)})


@pytest.mark.parametrize(
    "graph",
    [b"", b"not a graph", bytes(1000), GRAPH.read_bytes()[:60], GRAPH.read_bytes()[:-1]],
    ids=["empty", "text", "zeros", "beginning", "all but a byte"],
)
def test_file_that_is_no_graph_is_refused_in_one_line(tmp_path: Path, graph: bytes) -> None:
    path = tmp_path / "inference.tflite"
    path.write_bytes(graph)
    with pytest.raises(StalledError, match=r"inference\.tflite: LiteRT refuses the graph: .+") as refusal:
        TfliteBackend(path)
    assert "\n" not in str(refusal.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StalledError, match=r"inference\.tflite: No such file"):
        TfliteBackend(tmp_path / "inference.tflite")


def test_device_without_a_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, LITERT, None)
    monkeypatch.setitem(sys.modules, OLDER, None)
    with pytest.raises(StalledError, match=r"needs LiteRT: pip install 'edge-fl\[tflite\]'"):
        TfliteBackend(GRAPH)


@pytest.fixture
def older_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replace LiteRT by a tflite-runtime of the given source."""

    def install(source: str) -> None:
        (tmp_path / "tflite_runtime").mkdir()
        (tmp_path / "tflite_runtime/__init__.py").touch()
        (tmp_path / "tflite_runtime/interpreter.py").write_text(source)
        monkeypatch.setitem(sys.modules, LITERT, None)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for name in ("tflite_runtime", OLDER):
        sys.modules.pop(name, None)


def test_runtime_that_dies_with_this_numpy_is_told_from_a_bad_graph(older_runtime) -> None:
    older_runtime("def Interpreter(**options):\n    raise SystemError from ImportError('numpy.core.multiarray')\n")
    with pytest.raises(StalledError, match=r"tflite-runtime is there and does not work with NumPy .* pip install"):
        TfliteBackend(GRAPH)


def test_tflite_runtime_serves_where_litert_is_missing(older_runtime, expected) -> None:
    import_module(LITERT)  # the module below finds it in its package
    older_runtime("import ai_edge_litert\nInterpreter = ai_edge_litert.interpreter.Interpreter\n")
    outputs = TfliteBackend(GRAPH).run({"image": expected["image"]})
    np.testing.assert_allclose(outputs[0], expected["logits"], atol=1e-5)


def test_tflite_runtime_with_the_numpy_it_needs_answers_alike(tmp_path: Path, expected) -> None:
    try:
        python = prepare_python("older-tflite", OLDER_DIR / "pins.txt")
    except subprocess.CalledProcessError:
        pytest.skip("tflite-runtime 2.14 cannot be installed: the registry is out of reach, or not Python 3.11")
    done = subprocess.run(
        [python, OLDER_DIR / "program.py", GRAPH, DATA / "tflite-version.npz", tmp_path / "found.npz"],
        env={"PYTHONPATH": str(DATA.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.26.4", "tflite_runtime"]
    with np.load(tmp_path / "found.npz") as found:
        for rows in (1, 5, 32):
            np.testing.assert_allclose(found[f"logits_{rows}"], expected["logits"][:rows], atol=STEP)
