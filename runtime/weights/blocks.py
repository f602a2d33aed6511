"""8-bit floats with a scale for each block of rows and columns, and stacks that lie the other way round."""

from copy import copy

import torch
from torch import Tensor

from headrace.runtime.manifest import WeightSpec
from headrace.runtime.weights.small_floats import fp8_values
from headrace.runtime.weights.weight import Scratch, Weight, room_for


class Fp8Weight(Weight):
    """A matrix, or a stack of them, in float8_e4m3 with float32 scales of blocks."""

    def __init__(self, spec: WeightSpec, parts: dict[str, Tensor]) -> None:
        super().__init__(spec.shape)
        rows, columns = spec.shape[-2:]
        self._block = spec.block_rows, spec.blocksize
        self._first = 0
        self._data = parts["data"].view(-1, rows, columns)
        # [matrices, blocks of rows, blocks of columns]
        self._scale = parts["scale"].view(len(self._data), -(-rows // spec.block_rows), -1)

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
