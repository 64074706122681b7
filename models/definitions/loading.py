"""How a model definition is found: in a file of the user's or in an installed module. Its code runs."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from models.definitions.definition import ModelDefinition


class UnusableDefinitionError(Exception):
    """The definition's author must change it."""


class NoDefinitionError(Exception):
    """There is no definition where it was looked for."""


def load_definition(reference: str) -> ModelDefinition:
    """Return the definition that `FILE.py:NAME` or `package.module:NAME` names.

    Raises:
        NoDefinitionError: The reference is malformed, or there is no such file or module.
        UnusableDefinitionError: The code fails, lacks the name, or holds something else under it.
    """
    source, separator, name = reference.rpartition(":")
    if not separator or not source or not name.isidentifier():
        raise NoDefinitionError(f"{reference!r} is no definition: write FILE.py:NAME or package.module:NAME")
    module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if isinstance(value, ModelDefinition)]
        raise UnusableDefinitionError(f"{source} has no {name!r}; definitions there: {', '.join(known) or 'none'}")
    definition = getattr(module, name)
    if not isinstance(definition, ModelDefinition):
        raise UnusableDefinitionError(f"{reference} is of type {type(definition).__name__}, expected ModelDefinition")
    return definition


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise NoDefinitionError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"_definition_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses in the file look themselves up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module.__name__]
        raise UnusableDefinitionError(f"{path}: {type(error).__name__}: {_first_line(error)}") from error
    return module


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise NoDefinitionError(f"no module named {name!r}; a file is written FILE.py:NAME") from error
        raise UnusableDefinitionError(f"{name}: {error}") from error
    except Exception as error:
        raise UnusableDefinitionError(f"{name}: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
