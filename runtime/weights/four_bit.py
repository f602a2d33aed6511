"""bitsandbytes' NF4 and FP4."""

from copy import copy
from math import gcd, prod

import torch
from torch import Tensor

import headrace.runtime.bnb  # noqa: F401  (registers torch.ops.bitsandbytes)
from headrace.runtime.manifest import WeightSpec
from headrace.runtime.matmul.configs import Codes, Packing
from headrace.runtime.matmul.few_rows import packing_of
from headrace.runtime.weights.dequantize import dequantize_4bit
from headrace.runtime.weights.weight import Scratch, Weight, room_for


class FourBitWeight(Weight):
    """bitsandbytes' 4-bit layout: one scale per `blocksize` consecutive elements, high nibble first."""

    def __init__(self, spec: WeightSpec, parts: dict[str, Tensor]) -> None:
        super().__init__(spec.shape)
        self._spec = spec
        self._parts = parts
        self._packed = parts["data"].view(-1)
        self._first = 0
        self._packing = packing_of(spec)

    @property
    def packing(self) -> Packing | None:
        return self._packing

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def row_multiple(self) -> int:
        row = prod(self.shape[1:])
        return self._spec.blocksize // gcd(row, self._spec.blocksize)

    def rows(self, start: int, stop: int) -> Weight:
        row = prod(self.shape[1:])
        first = self._first + start * row
        assert first % self._spec.blocksize == 0, (start, self.shape, self._spec.blocksize)
        piece = copy(self)
        piece.shape = torch.Size((stop - start, *self.shape[1:]))
        piece._first = first
        piece._packed = self._packed[start * row // 2 : stop * row // 2]
        return piece

    def _scales(self) -> Tensor:
        """float32 [blocks of this piece]; doubly quantized scales are decoded for the piece only."""
        spec, parts = self._spec, self._parts
        begin = self._first // spec.blocksize
        end = begin - (-self.shape.numel() // spec.blocksize)
        if "nested_absmax" not in parts:
            return parts["absmax"].view(-1)[begin:end]
        # Decoding starts where a block of scales does.
        lead = begin % spec.nested_blocksize
        group = (begin - lead) // spec.nested_blocksize
        scales: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
            parts["absmax"].view(-1)[begin - lead : end],
            parts["nested_absmax"][group:],
            parts["nested_code"],
            spec.nested_blocksize,
            torch.float32,
        )
        return scales[lead:] + spec.nested_offset

    def dense(self, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
        spec = self._spec
        # The CPU kernel counts scales from each row's start, which holds for whole blocks only.
        flat = self.shape[-1] % spec.blocksize != 0
        shape = (1, self.shape.numel()) if flat else tuple(self.shape)
        out = room_for(shape, dtype, self._packed.device, scratch)
        packed = self._packed.view(-1, 1)
        dequantize_4bit(packed, self._scales(), spec.blocksize, spec.format, shape, out)
        return out.view(self.shape)

    def codes(self) -> Codes:
        columns, depth = self.shape
        spec = self._spec
        return Codes(spec.format, self._packed, self._scales(), spec.blocksize, (columns, depth))
