"""Recurrent and attention layers, written out with Linear layers that book-keeping and Opacus can watch.

torch computes them in one piece, which hooks cannot see into and which has neither a batching rule nor, backwards, an
ONNX translation. What is written out computes the same; recurrent layers grow the graph with every time step.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

# (x, y, mask, clipping_norm, *parameters) -> (*sums, norms)
Step: TypeAlias = Callable[..., tuple[Tensor, ...]]

_Names: TypeAlias = dict[str, tuple[str, ...]]  # of the original -> of its parts
_Builder: TypeAlias = Callable[[Any], tuple[nn.Module, _Names]]
_Gates: TypeAlias = Callable[
    [Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]
]  # input part, hidden part, state -> state


def build_substituted(module: nn.Module) -> tuple[nn.Module, _Names]:
    """Return a copy of `module` with what is written out here, and the names of its parameters by that of the original.

    Several names are the parts of one parameter along its first axis. A module with nothing to write out is returned
    as it is.
    """
    found = {path: child for path, child in module.named_modules() if _get_builder(child)}
    names: _Names = {name: (name,) for name, _ in module.named_parameters()}
    if not found:
        return module, names
    module = copy.deepcopy(module)
    for path, child in found.items():
        builder = _get_builder(child)
        assert builder is not None
        substitute, parts = builder(child)
        if not path:
            return substitute, parts
        module.set_submodule(path, substitute.train(child.training))
        names |= {f"{path}.{name}": tuple(f"{path}.{part}" for part in of_name) for name, of_name in parts.items()}
    return module, names


def restore_parameters(step: Step, substituted: nn.Module, names: Mapping[str, Sequence[str]]) -> Step:
    """Return `step`, which is of the `substituted` module, with the parameters and sums of the original."""
    order = [name for name, _ in substituted.named_parameters()]
    sizes = {name: len(parameter) for name, parameter in substituted.named_parameters() if parameter.ndim}

    def restored(x: Tensor, y: Tensor, mask: Tensor, clipping_norm: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        parts: dict[str, Tensor] = {}
        for of_name, value in zip(names.values(), values, strict=True):
            split = [value] if len(of_name) == 1 else torch.split(value, [sizes[part] for part in of_name])
            parts.update(zip(of_name, split, strict=True))
        *sums, norms = step(x, y, mask, clipping_norm, *(parts[name] for name in order))
        found = dict(zip(order, sums, strict=True))
        joined = (torch.cat([found[part] for part in of_name]) for of_name in names.values() if len(of_name) > 1)
        return (*(next(joined) if len(of_name) > 1 else found[of_name[0]] for of_name in names.values()), norms)

    return restored


class _Recurrent(nn.Module):
    """nn.RNN, nn.GRU or nn.LSTM, one time step after the other; takes and returns what they do."""

    def __init__(self, layer: nn.RNNBase, gates: _Gates, states: int) -> None:
        super().__init__()
        self._batch_first, self._gates, self._states, self._hidden = layer.batch_first, gates, states, layer.hidden_size
        self._sides = 2 if layer.bidirectional else 1
        self._suffixes = [suffix for suffix, _ in _walk_cells(layer)]
        for suffix, width_in in _walk_cells(layer):
            rows = len(getattr(layer, f"weight_ih_{suffix}"))
            self.add_module(f"ih_{suffix}", nn.Linear(width_in, rows, bias=layer.bias))
            self.add_module(f"hh_{suffix}", nn.Linear(layer.hidden_size, rows, bias=layer.bias))

    def forward(self, inputs: Tensor, start: Any = None) -> tuple[Tensor, Any]:
        rows = inputs if self._batch_first else inputs.transpose(0, 1)
        zeros = rows.new_zeros(rows.shape[0], self._hidden)
        starts = () if start is None else start if isinstance(start, tuple) else (start,)
        ends = []
        for first in range(0, len(self._suffixes), self._sides):
            sides = []
            for i in range(first, first + self._sides):
                state = tuple(part[i] for part in starts) or (zeros,) * self._states
                outputs, state = self._run(self._suffixes[i], rows, state, is_reverse=i > first)
                sides.append(outputs)
                ends.append(state)
            rows = torch.cat(sides, -1) if len(sides) > 1 else sides[0]
        final = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
        return rows if self._batch_first else rows.transpose(0, 1), final if self._states > 1 else final[0]

    def _run(
        self, suffix: str, rows: Tensor, state: tuple[Tensor, ...], *, is_reverse: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        by_input, by_hidden = self.get_submodule(f"ih_{suffix}")(rows), self.get_submodule(f"hh_{suffix}")
        times = range(rows.shape[1])
        outputs = []
        for t in reversed(times) if is_reverse else times:
            state = self._gates(by_input[:, t], by_hidden(state[0]), state)
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if is_reverse else outputs, 1), state


class _Attention(nn.Module):
    """nn.MultiheadAttention; takes and returns what it does, for batches."""

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        self.batch_first, self._heads = layer.batch_first, layer.num_heads
        has_bias = layer.in_proj_bias is not None
        self.query = nn.Linear(layer.embed_dim, layer.embed_dim, bias=has_bias)
        self.key = nn.Linear(layer.kdim, layer.embed_dim, bias=has_bias)
        self.value = nn.Linear(layer.vdim, layer.embed_dim, bias=has_bias)
        self.out_proj = nn.Linear(layer.embed_dim, layer.embed_dim, bias=layer.out_proj.bias is not None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: ARG002, FBT001, FBT002 - a hint about attn_mask
    ) -> tuple[Tensor, Tensor | None]:
        if not self.batch_first:
            query, key, value = (array.transpose(0, 1) for array in (query, key, value))
        q, k, v = (self._split(array) for array in (self.query(query), self.key(key), self.value(value)))
        scores = q @ k.transpose(2, 3) * (1 / q.shape[3] ** 0.5)
        if attn_mask is not None:
            mask = attn_mask if attn_mask.ndim == 2 else attn_mask.reshape(scores.shape)
            scores = _mask(scores, mask)
        if key_padding_mask is not None:
            scores = _mask(scores, key_padding_mask[:, None, None])
        weights = torch.softmax(scores, -1)
        output = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        seen = None
        if need_weights:
            seen = weights.mean(1) if average_attn_weights else weights
        return output if self.batch_first else output.transpose(0, 1), seen

    def _split(self, array: Tensor) -> Tensor:
        """Return `array`, shape (n, length, width), as (n, heads, length, width of a head)."""
        return array.reshape(*array.shape[:2], self._heads, -1).transpose(1, 2)


def _mask(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


def _build_recurrent(gates: _Gates, states: int) -> _Builder:
    def build(layer: nn.RNNBase) -> tuple[nn.Module, _Names]:
        kinds = ("weight", "bias") if layer.bias else ("weight",)
        names: _Names = {
            f"{kind}_{part}_{suffix}": (f"{part}_{suffix}.{kind}",)
            for suffix, _ in _walk_cells(layer)
            for kind in kinds
            for part in ("ih", "hh")
        }
        return _Recurrent(layer, gates, states), names

    return build


def _build_attention(layer: nn.MultiheadAttention) -> tuple[nn.Module, _Names]:
    roles = ("query", "key", "value")
    weights = tuple(f"{role}.weight" for role in roles)
    names: _Names = (
        {"in_proj_weight": weights}
        if layer.in_proj_weight is not None
        else {f"{role[0]}_proj_weight": (weight,) for role, weight in zip(roles, weights, strict=True)}
    )
    if layer.in_proj_bias is not None:
        names["in_proj_bias"] = tuple(f"{role}.bias" for role in roles)
    names |= {f"out_proj.{name}": (f"out_proj.{name}",) for name, _ in layer.out_proj.named_parameters()}
    return _Attention(layer), names


def _walk_cells(layer: nn.RNNBase) -> Iterator[tuple[str, int]]:
    """Yield the suffix of the parameters of each cell, and the width of its input, in torch's order."""
    sides = ["", "_reverse"] if layer.bidirectional else [""]
    for i in range(layer.num_layers):
        for side in sides:
            yield f"l{i}{side}", layer.input_size if i == 0 else layer.hidden_size * len(sides)


def _step_gru(by_input: Tensor, by_hidden: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (reset_in, update_in, new_in), (reset, update, new) = by_input.chunk(3, -1), by_hidden.chunk(3, -1)
    kept = torch.sigmoid(update_in + update)
    candidate = torch.tanh(new_in + torch.sigmoid(reset_in + reset) * new)
    return (candidate + kept * (state[0] - candidate),)


def _step_lstm(by_input: Tensor, by_hidden: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    taken, kept, candidate, shown = (by_input + by_hidden).chunk(4, -1)
    cell = torch.sigmoid(kept) * state[1] + torch.sigmoid(taken) * torch.tanh(candidate)
    return torch.sigmoid(shown) * torch.tanh(cell), cell


def _step_tanh(by_input: Tensor, by_hidden: Tensor, _state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.tanh(by_input + by_hidden),)


def _step_relu(by_input: Tensor, by_hidden: Tensor, _state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (torch.relu(by_input + by_hidden),)


def _get_builder(layer: nn.Module) -> _Builder | None:
    """Return what writes `layer` out, or None; by exact type, since a subclass may compute something else."""
    if type(layer) is nn.MultiheadAttention:
        is_plain = layer.bias_k is None and not layer.add_zero_attn
        return _build_attention if is_plain else None
    if type(layer) is nn.GRU:
        return _build_recurrent(_step_gru, 1)
    if type(layer) is nn.LSTM:
        return _build_recurrent(_step_lstm, 2) if layer.proj_size == 0 else None
    if type(layer) is nn.RNN:
        return _build_recurrent(_step_tanh if layer.nonlinearity == "tanh" else _step_relu, 1)
    return None
