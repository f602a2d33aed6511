"""bitsandbytes' NF4 and FP4."""

from collections.abc import Sequence
from math import gcd, prod

import torch
from torch import Tensor

import headrace.runtime.bnb  # noqa: F401  (registers torch.ops.bitsandbytes)
from headrace.runtime.matmul.configs import Codes
from headrace.runtime.matmul.few_rows import multiply
from headrace.runtime.store import WeightSpec
from headrace.runtime.weights.dequantize import dequantize_4bit
from headrace.runtime.weights.weight import Scratch, Weight, room_for, tracer_of


class FourBitWeight(Weight):
    """bitsandbytes' 4-bit layout: one scale per `blocksize` consecutive elements, high nibble first."""

    def __init__(self, spec: WeightSpec, parts: dict[str, Tensor]) -> None:
        super().__init__(spec.shape)
        self._spec = spec
        self._parts = parts
        self._packed = parts["data"].view(-1)
        self._first = 0

    @property
    def kind(self) -> str:
        return self._spec.format

    @property
    def group(self) -> int:
        """Elements of a scale."""
        return self._spec.blocksize

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
        piece = FourBitWeight(self._spec, self._parts)
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

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        scratch: Scratch | None = None,
        transposed: bool = False,
    ) -> Tensor:
        found = None if transposed else multiply(x, [self], [bias], tracer_of(scratch))
        return super().linear(x, bias, scratch, transposed) if found is None else found[0]

    def together(
        self,
        others: Sequence[Weight],
        x: Tensor,
        biases: Sequence[Tensor | None],
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, ...] | None:
        weights = [self, *(weight for weight in others if isinstance(weight, FourBitWeight))]
        if len(weights) <= len(others):
            return None
        return multiply(x, weights, biases, tracer_of(scratch))

    def codes(self) -> Codes:
        columns, depth = self.shape
        return Codes(self.kind, self._packed, self._scales(), self.group, (columns, depth))
