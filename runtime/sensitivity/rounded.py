"""Weights that are rounded whenever they are used."""

from collections.abc import Callable

import torch
from torch import Tensor

from headrace.runtime.weights.weight import Scratch, Weight


class RoundedWeight(Weight):
    """`weight`'s values through `rounding`, [N, K] float32 to the same, row by row."""

    def __init__(self, weight: Weight, rounding: Callable[[Tensor], Tensor]) -> None:
        super().__init__(tuple(weight.shape))
        self._weight, self._rounding = weight, rounding

    @property
    def dtype(self) -> torch.dtype:
        """No type that is computed in, so that rows are taken as the scratch has room."""
        return torch.uint8

    def rows(self, start: int, stop: int) -> Weight:
        return RoundedWeight(self._weight.rows(start, stop), self._rounding)

    def dense(self, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
        values = self._weight.dense(torch.float32)
        rounded = self._rounding(values.view(-1, values.shape[-1]))
        return rounded.view(values.shape).to(dtype)
