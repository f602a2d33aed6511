"""8-bit floats with a scale for each block of rows and columns, and stacks that lie the other way round."""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from headrace.runtime.manifest import WeightSpec
from headrace.runtime.matmul import fp8
from headrace.runtime.trace import Kind
from headrace.runtime.weights.small_floats import fp8_values
from headrace.runtime.weights.weight import Scratch, Weight, room_for, tracer_of


class Fp8Weight(Weight):
    """A matrix, or a stack of them, in float8_e4m3 with float32 scales of blocks.

    With `fp8_rows` a whole matrix is multiplied by rows in float8_e4m3, too, where the device does that.
    """

    def __init__(self, spec: WeightSpec, parts: dict[str, Tensor]) -> None:
        super().__init__(spec.shape)
        rows, columns = spec.shape[-2:]
        self._block = spec.block_rows, spec.blocksize
        self._height = rows
        self._first = 0
        self._data = parts["data"].view(-1, rows, columns)
        # [matrices, blocks of rows, blocks of columns]
        self._scale = parts["scale"].view(len(self._data), -(-rows // spec.block_rows), -1)
        scales = fp8.scales_of(spec.shape, self._block) if spec.fp8_rows else None
        if scales is not None and scales not in fp8.multiplied_by(self._data.device):
            scales = None
        self._scales = scales

    @property
    def dtype(self) -> torch.dtype:
        return self._data.dtype

    def rows(self, start: int, stop: int) -> Weight:
        piece = copy(self)
        piece.shape = torch.Size((stop - start, *self.shape[1:]))
        if len(self.shape) == 3:
            piece._data, piece._scale = self._data[start:stop], self._scale[start:stop]
        else:
            # Scales stay whole: a run of rows may begin within a block.
            piece._data, piece._first = self._data[:, start:stop], self._first + start
        return piece

    def dense(self, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
        shape = tuple(self.shape)
        out = room_for(shape, dtype, self._data.device, scratch)
        for data, scale, values in zip(
            self._data, self._scale, out.view(self._data.shape), strict=True
        ):
            fp8_values(data, scale, self._block, self._first, values)
        return out

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        scratch: Scratch | None = None,
        transposed: bool = False,
    ) -> Tensor:
        if transposed or not self._takes_fp8(x):
            return super().linear(x, bias, scratch, transposed)
        return self._products([self], x, [bias], scratch)[0]

    def together(
        self,
        others: Sequence[Weight],
        x: Tensor,
        biases: Sequence[Tensor | None],
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, ...] | None:
        """As in Weight, rows being rounded once for all."""
        weights = [self, *(weight for weight in others if isinstance(weight, Fp8Weight))]
        alike = all(each._scales is self._scales and each._takes_fp8(x) for each in weights)
        if len(weights) <= len(others) or not alike:
            return None
        return self._products(weights, x, biases, scratch)

    def _takes_fp8(self, x: Tensor) -> bool:
        """Whether x is multiplied in 8 bits by this, a whole matrix."""
        whole = len(self.shape) == 2 and self.shape[0] == self._height
        return self._scales is not None and whole and x.dtype == torch.bfloat16

    def _products(
        self,
        weights: Sequence["Fp8Weight"],
        x: Tensor,
        biases: Sequence[Tensor | None],
        scratch: Scratch | None,
    ) -> tuple[Tensor, ...]:
        assert self._scales is not None
        made = []
        with tracer_of(scratch).span(Kind.MATMUL, "fp8"):
            rows = fp8.rounded(x, self._scales)
            for weight, bias in zip(weights, biases, strict=True):
                data, scale = weight._data[0], weight._scale[0]
                out = fp8.multiply(rows, data, scale, self._scales).view(*x.shape[:-1], -1)
                made.append(out if bias is None else out.add_(bias))
        return tuple(made)


class TurnedWeight(Weight):
    """A stack [experts, rows, columns] of which every matrix is stored transposed."""

    def __init__(self, stored: Weight) -> None:
        *stack, columns, rows = stored.shape
        super().__init__((*stack, rows, columns))
        self._stored = stored

    @property
    def dtype(self) -> torch.dtype:
        return self._stored.dtype

    def rows(self, start: int, stop: int) -> Weight:
        assert len(self.shape) == 3, "rows of one matrix do not lie together"
        return TurnedWeight(self._stored.rows(start, stop))

    def expert(self, index: int) -> Weight:
        return TurnedWeight(self._stored.expert(index))

    def dense(self, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
        return self._stored.dense(dtype, scratch).mT

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        scratch: Scratch | None = None,
        transposed: bool = False,
    ) -> Tensor:
        return self._stored.linear(x, bias, scratch, not transposed)
