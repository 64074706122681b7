"""How the coordinator's commands find a model definition."""

from fl_server.errors import DefinitionError, UsageError
from models.definitions import ModelDefinition, loading


def load_definition(reference: str) -> ModelDefinition:
    """Return the definition that `FILE.py:NAME` or `package.module:NAME` names.

    Raises:
        UsageError: The reference is malformed, or there is no such file or module.
        DefinitionError: The code fails, lacks the name, or holds something else under it.
    """
    try:
        return loading.load_definition(reference)
    except loading.NoDefinitionError as error:
        raise UsageError(str(error)) from error
    except loading.UnusableDefinitionError as error:
        raise DefinitionError(str(error)) from error
