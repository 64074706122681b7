"""What a runtime must do to serve a model."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


class Backend(Protocol):
    """One loaded inference graph; released with its last reference."""

    @property
    def input_names(self) -> Sequence[str]: ...

    @property
    def output_names(self) -> Sequence[str]: ...

    def run(self, inputs: Mapping[str, Array]) -> Sequence[Array]:
        """Return the outputs in the order of `output_names`; safe to call from several threads.

        Raises:
            RequestError: The graph cannot run on these inputs.
        """
        ...
