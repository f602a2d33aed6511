"""A mixture's experts as separate weights: tokens are grouped by expert, each expert runs once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headrace.runtime.linear import Scratch, Weight
from headrace.runtime.store import WeightSpec


@dataclass(frozen=True, slots=True)
class ExpertSpecs:
    """Where one layer's expert matrices are: a stack [experts, rows, columns] or one per expert.

    `enter[e]` is expert e's (gate, up), the two fused, or up alone; `leave[e]` is down. Stacks have
    a single entry that serves all.
    """

    count: int
    enter: tuple[tuple[WeightSpec, ...], ...]
    leave: tuple[WeightSpec, ...]


class BoundExperts:
    """The experts of one layer while their bytes are in `block`.

    Called by transformers' experts modules through plugs.EXPERTS, in the place of their own loop and
    with its arithmetic: expert by expert in ascending order, weighted in the router's dtype, summed
    into the output in the input's dtype.
    """

    def __init__(
        self,
        specs: ExpertSpecs,
        block: Tensor,
        scratch: Scratch,
        view: Callable[[WeightSpec, Tensor], Weight] = Weight.view,
    ) -> None:
        self._specs = specs
        self._read = view
        self._block = block
        self._scratch = scratch
        self._views: dict[int, tuple[tuple[Weight, ...], Weight]] = {}

    def __call__(self, module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """x [T, H], index and weight [T, top_k] -> [T, H]."""
        top_k = index.shape[-1]
        # Stable: an expert's tokens stay in order, so that its result is a function of its tokens.
        ids, order = torch.sort(index.reshape(-1), stable=True)
        counts = torch.bincount(ids, minlength=self._specs.count).tolist()
        token, scale = order // top_k, weight.reshape(-1, 1).index_select(0, order)
        out = torch.zeros_like(x)
        start = 0
        # An index beyond the last expert means "none" in transformers.
        for expert, n in enumerate(counts[: self._specs.count]):
            if n:
                rows = token[start : start + n]
                result = self._run(module, expert, x.index_select(0, rows))
                weighted = result * scale[start : start + n]
                out.index_add_(0, rows, weighted.to(out.dtype))
                start += n
        return out

    def _run(self, module: Any, expert: int, x: Tensor) -> Tensor:
        """One expert on its tokens [n, H]."""
        transposed = bool(module.is_transposed)
        enter, leave = self._weights(expert)
        pieces = [weight.linear(x, None, self._scratch, transposed) for weight in enter]
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

    def _weights(self, expert: int) -> tuple[tuple[Weight, ...], Weight]:
        """Views are made for the experts that tokens reach; there can be hundreds that none does."""
        if expert not in self._views:
            enter = self._specs.enter[min(expert, len(self._specs.enter) - 1)]
            leave = self._specs.leave[min(expert, len(self._specs.leave) - 1)]
            self._views[expert] = (
                tuple(self._view(spec, expert) for spec in enter),
                self._view(leave, expert),
            )
        return self._views[expert]

    def _view(self, spec: WeightSpec, expert: int) -> Weight:
        weight = self._read(spec, self._block)
        return weight.expert(expert) if len(spec.shape) == 3 else weight
