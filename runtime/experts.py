"""A mixture's experts as separate weights: tokens are grouped by expert, each expert runs once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headrace.runtime.expert_extents import Extent
from headrace.runtime.manifest import WeightSpec
from headrace.runtime.recording import Interruptions
from headrace.runtime.weights.view import view_weight
from headrace.runtime.weights.weight import Scratch, Weight

Matrices = tuple[tuple[Weight, ...], Weight]
"""One expert's (gate, up), the two fused, or up alone; and down."""

Obtain = Callable[[Sequence[int]], Iterator[tuple[int, Matrices]]]
"""Gives each of some experts with its matrices, in the same order, valid until the next is asked for."""

Fetch = Callable[[Sequence[int]], Iterator[tuple[int, Tensor]]]
"""Like Obtain, but gives the bytes of each expert's extent (uint8)."""


@dataclass(frozen=True, slots=True)
class ExpertSpecs:
    """Where one layer's expert matrices are: a stack [experts, rows, columns] or one per expert.

    `enter[e]` is expert e's (gate, up), the two fused, or up alone; `leave[e]` is down. Stacks have
    a single entry that serves all.
    """

    count: int
    enter: tuple[tuple[WeightSpec, ...], ...]
    leave: tuple[WeightSpec, ...]

    def of(self, expert: int) -> tuple[tuple[WeightSpec, ...], WeightSpec]:
        """Where one expert's matrices, or the stacks that hold them, are."""
        enter = self.enter[min(expert, len(self.enter) - 1)]
        return enter, self.leave[min(expert, len(self.leave) - 1)]

    def within(self, extents: Sequence[Extent]) -> "ExpertSpecs":
        """The same for experts that are read alone: each relative to its extent."""
        assert len(self.enter) == len(self.leave) == self.count == len(extents)
        enter = tuple(
            tuple(_moved(spec, -extent.offset) for spec in specs)
            for specs, extent in zip(self.enter, extents, strict=True)
        )
        leave = zip(self.leave, extents, strict=True)
        return ExpertSpecs(self.count, enter, tuple(_moved(s, -e.offset) for s, e in leave))


def _moved(spec: WeightSpec, by: int) -> WeightSpec:
    parts = {role: replace(part, offset=part.offset + by) for role, part in spec.parts.items()}
    return replace(spec, parts=parts)


class ExpertsInBlock:
    """All experts of a layer, whose bytes are in `block`; `view` reads them.

    Views are made for the experts that tokens reach; there can be hundreds that none does.
    """

    def __init__(
        self, specs: ExpertSpecs, block: Tensor, view: Callable[[WeightSpec, Tensor], Weight]
    ) -> None:
        self._specs, self._block, self._read = specs, block, view
        self._views: dict[int, Matrices] = {}

    def __call__(self, experts: Sequence[int]) -> Iterator[tuple[int, Matrices]]:
        for expert in experts:
            if expert not in self._views:
                enter, leave = self._specs.of(expert)
                pieces = tuple(self._view(spec, expert) for spec in enter)
                self._views[expert] = pieces, self._view(leave, expert)
            yield expert, self._views[expert]

    def _view(self, spec: WeightSpec, expert: int) -> Weight:
        weight = self._read(spec, self._block)
        return weight.expert(expert) if len(spec.shape) == 3 else weight


class SlotViews:
    """Views of what is in a stage's slots: of each slot, those of the expert that was in it last."""

    def __init__(self) -> None:
        self._views: dict[int, tuple[FetchedExperts, int, Matrices]] = {}

    def of(self, layer: "FetchedExperts", expert: int, data: Tensor) -> Matrices:
        """Those of a layer's expert in the slot `data`, made anew if another one was there."""
        held = self._views.get(data.data_ptr())
        if held is not None and held[0] is layer and held[1] == expert:
            return held[2]
        made = layer.view(expert, data)
        self._views[data.data_ptr()] = layer, expert, made
        return made


class FetchedExperts:
    """A layer's experts, each fetched when it is asked for. `specs` are relative to their extents."""

    def __init__(self, specs: ExpertSpecs, fetch: Fetch, views: SlotViews) -> None:
        self._specs, self._fetch, self._views = specs, fetch, views

    def __call__(self, experts: Sequence[int]) -> Iterator[tuple[int, Matrices]]:
        for expert, data in self._fetch(experts):
            yield expert, self._views.of(self, expert, data)

    def view(self, expert: int, data: Tensor) -> Matrices:
        enter, leave = self._specs.of(expert)
        return tuple(view_weight(spec, data) for spec in enter), view_weight(leave, data)


class BoundExperts:
    """The experts of one layer, by their matrices.

    Called by transformers' experts modules through plugs.EXPERTS, in the place of their own loop and
    with its arithmetic: expert by expert in ascending order, weighted in the router's dtype, summed
    into the output in the input's dtype.
    """

    def __init__(
        self, count: int, obtain: Obtain, scratch: Scratch, interrupt: Interruptions
    ) -> None:
        self._count = count
        self._obtain = obtain
        self._scratch = scratch
        self._interrupt = interrupt

    def __call__(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """x [T, H], index and weight [T, top_k] -> [T, H]."""
        top_k = index.shape[-1]
        # Stable: an expert's tokens stay in order, so that its result is a function of its tokens.
        ids, order = torch.sort(index.reshape(-1), stable=True)
        each = torch.arange(self._count + 1, dtype=ids.dtype, device=ids.device)
        starts = torch.searchsorted(ids, each)
        token, scale = order // top_k, weight.reshape(-1, 1).index_select(0, order)
        # The host has to know which experts are reached.
        run = partial(self._run_all, module)
        *_, out = self._interrupt(run, starts, x, token, scale, torch.zeros_like(x))
        return out

    def _run_all(
        self, module: nn.Module, starts: list[int], x: Tensor, token: Tensor, scale: Tensor,
        out: Tensor,
    ) -> None:  # fmt: skip
        """Add to out [T, H] what experts make of x: of rows token[starts[e] : starts[e + 1]] expert e,
        weighted by `scale`. An index beyond the last expert means "none" in transformers."""
        reached = [e for e in range(self._count) if starts[e] < starts[e + 1]]
        for expert, matrices in self._obtain(reached):
            mine = slice(starts[expert], starts[expert + 1])
            rows = token[mine]
            result = self._run(module, expert, matrices, x.index_select(0, rows))
            weighted = result * scale[mine]
            out.index_add_(0, rows, weighted.to(out.dtype))

    def _run(self, module: Any, expert: int, matrices: Matrices, x: Tensor) -> Tensor:
        """One expert on its tokens [n, H]."""
        transposed = bool(module.is_transposed)
        enter, leave = matrices
        pieces = self._enter(enter, x, transposed)
        hidden = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        if module.has_bias:
            biases = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
            hidden = hidden + biases[expert]
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        bias = module.down_proj_bias[expert] if module.has_bias else None
        out: Tensor = leave.linear(hidden, bias, self._scratch, transposed)
        if getattr(module, "has_post_expert_norm", False):
            out = module.post_expert_norm(out)
        return out

    def _enter(self, weights: Sequence[Weight], x: Tensor, transposed: bool) -> tuple[Tensor, ...]:
        """x times each weight; gate and up in one launch where that is faster."""
        first, *others = weights
        if others and not transposed:
            found = first.together(others, x, [None] * len(weights), self._scratch)
            if found is not None:
                return found
        return tuple(weight.linear(x, None, self._scratch, transposed) for weight in weights)
