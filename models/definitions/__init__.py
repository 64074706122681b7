"""Model definitions, one use case a file; torch is imported only where a module is built."""

from models.definitions.definition import ModelDefinition
from models.tensors.features import Feature, Tokens
from models.tensors.spec import TensorSpec

__all__ = ["Feature", "ModelDefinition", "TensorSpec", "Tokens"]
