"""The linear layer that multiplies by a stored weight, which comes and goes."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import headrace.runtime.bnb  # noqa: F401  (registers torch.ops.bitsandbytes)
from headrace.runtime.trace import Kind
from headrace.runtime.weights.weight import Scratch, Weight

if TYPE_CHECKING:
    from headrace.runtime.adapters.matrices import LinearAdapters
    from headrace.runtime.linear_group import LinearGroup


class QuantLinear(nn.Module):
    """Stands in for an nn.Linear whose weight comes and goes. Bound by StageModel."""

    def __init__(self, linear: nn.Linear, scratch: Scratch) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight: Weight | None = None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)
        self.scratch = scratch
        self.group: LinearGroup | None = None
        self.adapters: LinearAdapters | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self._product(x)
        return y if self.adapters is None else self.adapters.add(y, x)

    def _product(self, x: Tensor) -> Tensor:
        assert self.weight is not None, "a layer ran before its weights were bound"
        if self.group is not None:
            found = self.group.take(self, x)
            if found is not None:
                return found
        return self.weight.linear(x, self.bias, self.scratch)

    def values(self, dtype: torch.dtype) -> Tensor:
        """The whole weight [N, K], valid until the scratch is used again."""
        assert self.weight is not None, "a layer ran before its weights were bound"
        if self.weight.dtype == dtype:
            return self.weight.dense(dtype)
        with self.scratch.tracer.span(Kind.DEQUANT):
            return self.weight.dense(dtype, self.scratch)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
