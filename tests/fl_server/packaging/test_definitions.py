import pytest

from fl_server.errors import DefinitionError, UsageError
from fl_server.packaging.definitions import load_definition

MINE = """
from dataclasses import dataclass
from torch import nn
from models.definitions import ModelDefinition, TensorSpec

@dataclass
class Width:
    value: int = 2

definition = ModelDefinition(
    name="mine",
    build=lambda: nn.Linear(4, Width().value),
    inputs=(TensorSpec("features", ("batch", 4), "float32"),),
    outputs=(TensorSpec("logits", ("batch", 2), "float32"),),
    loss="cross_entropy",
    metric="accuracy",
)
other = 3
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_definition_is_found_in_a_file_and_in_a_module(path):
    assert load_definition(f"{path}:definition").build().out_features == 2
    assert load_definition("models.definitions.digits:definition").name == "digits"


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("{path}", UsageError, "write FILE.py:NAME or package.module:NAME"),
        ("{path}:", UsageError, "write FILE.py:NAME"),
        ("{path}:not a name", UsageError, "write FILE.py:NAME"),
        ("{dir}/none.py:definition", UsageError, r"none\.py: no such file"),
        ("no.such.module:definition", UsageError, "no module named 'no.such.module'"),
        ("{path}:definitoin", DefinitionError, "has no 'definitoin'; definitions there: definition"),
        ("{path}:other", DefinitionError, "is of type int, expected ModelDefinition"),
    ],
)
def test_reference_that_leads_nowhere_says_what_to_write(path, reference, error, message):
    with pytest.raises(error, match=message):
        load_definition(reference.format(path=path, dir=path.parent))


@pytest.mark.parametrize(
    ("code", "message"),
    [("import nothing_of_that_name", "ModuleNotFoundError"), ("def", "SyntaxError"), ("1 / 0", "ZeroDivisionError")],
)
def test_definition_file_that_fails_is_blamed_in_one_line(path, code, message):
    path.write_text(code)
    with pytest.raises(DefinitionError, match=f"mine.py: {message}") as caught:
        load_definition(f"{path}:definition")
    assert "\n" not in str(caught.value)
