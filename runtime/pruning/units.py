"""What can be cut out of a layer in one piece: neurons of its MLP, groups of its attention heads.

Layers are looked at by what their linears are called in transformers. Whether a cut leaves a model that
computes what the whole one does without those neurons or heads is found by trying (trial.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from headrace.runtime import plugs
from headrace.runtime.pruning.cut import Cut
from headrace.scheduler.errors import UnsupportedModelError

_INTO_MLP = ("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h")
_OUT_OF_MLP = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")
_OUT_OF_ATTENTION = ("o_proj", "out_proj", "dense")
_TWICE = "gate_up_proj"
"""Gates' rows, then those that they multiply."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """From row `start` on, `each` rows of every unit, one unit after another."""

    start: int
    each: int


@dataclass(frozen=True, slots=True)
class Units:
    """`count` neurons, or groups of heads that share keys and values.

    `rows` says where a unit's rows are in the linears that make it, `out` is the linear that takes it in,
    by `each` columns a unit. Names are the layer's own ("mlp.down_proj").
    """

    count: int
    rows: Mapping[str, tuple[Stretch, ...]]
    out: str
    each: int

    def cuts(self, keep: Tensor) -> dict[str, Cut]:
        """By names of parameters in the layer, those that there may be; `keep` are units, ascending."""
        found = {}
        for linear, stretches in self.rows.items():
            rows = torch.cat([_places(keep, s.start, s.each) for s in stretches])
            found[f"{linear}.weight"] = found[f"{linear}.bias"] = Cut(rows=rows)
        found[f"{self.out}.weight"] = Cut(columns=_places(keep, 0, self.each))
        return found

    def out_columns(self, units: Tensor) -> Tensor:
        """The columns of `out` that these units fill."""
        return _places(units, 0, self.each)


def _places(units: Tensor, start: int, each: int) -> Tensor:
    return (start + units[:, None] * each + torch.arange(each)).flatten()


def neurons(layer: nn.Module) -> Units:
    """The neurons of a layer's MLP. Raises UnsupportedModelError, saying why, where none can be told."""
    refuse_mixture(layer)
    found = [*_mlps(layer)]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(layer).__name__} has {len(found)} MLPs whose linears are known by name, not one: "
            "its neurons cannot be cut"
        )
    return found[0]


def _mlps(layer: nn.Module) -> Iterator[Units]:
    for path, module in layer.named_modules():
        linears = {name: child for name, child in module.named_children() if _is_linear(child)}
        out = [name for name in _OUT_OF_MLP if name in linears]
        into = [name for name in _INTO_MLP if name in linears]
        if len(out) != 1 or not into:
            continue
        width = linears[out[0]].in_features
        rows = {
            _join(path, name): (Stretch(0, 1), Stretch(width, 1))[: 2 if name == _TWICE else 1]
            for name in into
        }
        yield Units(width, rows, _join(path, out[0]), 1)


def head_groups(layer: nn.Module, kv_heads: int) -> Units:
    """The groups of a layer's attention heads. Raises UnsupportedModelError, saying why."""
    for path, module in layer.named_modules():
        if module not in plugs.attention_modules(layer):
            continue
        linears = {name: child for name, child in module.named_children() if _is_linear(child)}
        out = next((linears[name] for name in _OUT_OF_ATTENTION if name in linears), None)
        if out is None:
            continue
        name = next(name for name in _OUT_OF_ATTENTION if name in linears)
        rows = _attention_rows(linears, out.in_features, kv_heads)
        if rows:
            rows = {_join(path, linear): places for linear, places in rows.items()}
            return Units(kv_heads, rows, _join(path, name), out.in_features // kv_heads)
    raise UnsupportedModelError(
        f"the attention of {type(layer).__name__} is not made of linears for queries, keys, values and the "
        "result that are known by name: its heads cannot be cut"
    )


def _attention_rows(
    linears: Mapping[str, nn.Linear], columns: int, kv_heads: int
) -> dict[str, tuple[Stretch, ...]]:
    """Where a group's rows are. `columns` are the result's: of all heads together."""
    apart = ("q_proj", "k_proj", "v_proj")
    if all(name in linears for name in apart):
        return {name: (Stretch(0, linears[name].out_features // kv_heads),) for name in apart}
    if "qkv_proj" in linears:
        keys = (linears["qkv_proj"].out_features - columns) // 2
        group, head = columns // kv_heads, keys // kv_heads
        starts = (Stretch(0, group), Stretch(columns, head), Stretch(columns + keys, head))
        return {"qkv_proj": starts}
    return {}


def refuse_mixture(layer: nn.Module) -> None:
    """Raises UnsupportedModelError for a layer with experts."""
    if any(plugs.is_experts(module) for module in layer.modules()):
        raise UnsupportedModelError(
            f"{type(layer).__name__} is a mixture of experts, of which only whole layers can be dropped"
        )


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
