"""Values as they are, and bitsandbytes' int8."""

import torch
from torch import Tensor

from headrace.runtime.weights.weight import Scratch, Weight, room_for


class RawWeight(Weight):
    """Values as they are."""

    def __init__(self, data: Tensor) -> None:
        super().__init__(data.shape)
        self._data = data

    @property
    def dtype(self) -> torch.dtype:
        return self._data.dtype

    def rows(self, start: int, stop: int) -> Weight:
        return RawWeight(self._data[start:stop])

    def dense(self, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
        data = self._data.view(self.shape)
        out = None if scratch is None or data.dtype == dtype else scratch.take(data.shape, dtype)
        return data.to(dtype) if out is None else out.copy_(data)


class Int8Weight(Weight):
    """bitsandbytes' row-wise int8: data [rows, columns] * scale [rows] / 127."""

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        super().__init__(data.shape)
        self._data = data
        self._scale = scale

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8

    def rows(self, start: int, stop: int) -> Weight:
        per_row = len(self._scale) // len(self._data)
        return Int8Weight(self._data[start:stop], self._scale[start * per_row : stop * per_row])

    def dense(self, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
        data = self._data.view(self.shape)
        out = room_for(data.shape, dtype, data.device, scratch)
        # Multiplied in float32 and rounded once.
        return torch.mul(data, self._scale.view(*data.shape[:-1], 1) / 127, out=out)
