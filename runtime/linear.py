"""Weights as views of the bytes they were stored in, and the linear layer that multiplies by them.

Packed bytes stay packed. Few rows on CUDA go to a fused 4-bit kernel, ours or bitsandbytes'; otherwise
a run of output rows is dequantized into a reused scratch buffer and multiplied there.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import gcd, prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import headrace.runtime.bnb  # noqa: F401  (registers torch.ops.bitsandbytes)
from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.runtime.dequantize import dequantize_4bit
from headrace.runtime.matmul.configs import Codes
from headrace.runtime.matmul.few_rows import multiply
from headrace.runtime.product import product
from headrace.runtime.store import TensorSpec, WeightSpec
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer

if TYPE_CHECKING:
    from headrace.runtime.adapters.matrices import LinearAdapters
    from headrace.runtime.linear_group import LinearGroup


class Scratch:
    """One buffer that holds a dequantized piece of a matrix; `tracer` times its uses."""

    def __init__(
        self,
        elements: int,
        dtype: torch.dtype,
        device: torch.device,
        tracer: Tracer = NULL_TRACER,
    ) -> None:
        self.elements = elements
        self.dtype = dtype
        self.tracer = tracer
        self._buffer = torch.empty(elements, dtype=dtype, device=device)

    @property
    def memory(self) -> Tensor:
        return self._buffer

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A tensor to write into, valid until the next `take`; None when the buffer cannot serve."""
        size = prod(shape)
        if dtype != self.dtype or size > len(self._buffer):
            return None
        return self._buffer[:size].view(shape)


class Weight(ABC):
    """A logical weight of `shape`, backed by views of a block's bytes."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = torch.Size(shape)

    @staticmethod
    def view(spec: WeightSpec, block: Tensor) -> "Weight":
        """The weight that `spec` places in `block`, a block's data section (uint8, any device)."""
        parts = parts_of(spec, block)
        if spec.format == "raw":
            return RawWeight(parts["data"].view(spec.shape))
        if spec.format == "int8":
            return Int8Weight(parts["data"].view(spec.shape), parts["scale"])
        if spec.format in ("nf4", "fp4"):
            return FourBitWeight(spec, parts)
        # Imported late: they are weights themselves.
        from headrace.runtime.stored_weights import stored_weight

        return stored_weight(spec, parts)

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What the bytes are stored as."""

    @property
    def row_multiple(self) -> int:
        """`rows` may start at multiples of this."""
        return 1

    @abstractmethod
    def rows(self, start: int, stop: int) -> "Weight":
        """Rows [start, stop) along the first axis, sharing the bytes."""

    @abstractmethod
    def dense(self, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
        """The weight's values: a view where the bytes are the values, else dequantized, in
        `scratch` if it is large enough (and then valid until the scratch is used again)."""

    def expert(self, index: int) -> "Weight":
        """Matrix `index` of a stack [experts, rows, columns]."""
        piece = self.rows(index, index + 1)
        piece.shape = self.shape[1:]
        return piece

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        scratch: Scratch | None = None,
        transposed: bool = False,
    ) -> Tensor:
        """x [..., K] times this weight [N, K], or [K, N] when `transposed`, plus bias: [..., N]."""
        if transposed:
            out = self._times(x, None, scratch, transposed=True)
            return out if bias is None else out + bias
        count, step = self.shape[0], self._rows_at_once(x.dtype, scratch)
        if step >= count:
            return self._times(x, bias, scratch)
        out = x.new_empty(*x.shape[:-1], count)
        for start in range(0, count, step):
            stop = min(start + step, count)
            some = None if bias is None else bias[start:stop]
            out[..., start:stop] = self.rows(start, stop)._times(x, some, scratch)
        return out

    def together(
        self,
        others: Sequence["Weight"],
        x: Tensor,
        biases: Sequence[Tensor | None],
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, ...] | None:
        """x times this weight and each of `others`, plus biases, in one launch; None where there is
        none for them or it is not faster."""
        return None

    def _times(
        self, x: Tensor, bias: Tensor | None, scratch: Scratch | None, *, transposed: bool = False
    ) -> Tensor:
        """`linear` with all of this weight dequantized at once."""
        tracer = tracer_of(scratch)
        if x.dtype == self.dtype:
            values = self.dense(x.dtype, scratch)
        else:
            with tracer.span(Kind.DEQUANT):
                values = self.dense(x.dtype, scratch)
        with tracer.span(Kind.MATMUL):
            return product(x, values.mT if transposed else values, bias)

    def _rows_at_once(self, dtype: torch.dtype, scratch: Scratch | None) -> int:
        """Rows that fit the scratch; all when they need none."""
        if scratch is None or not scratch.elements or dtype != scratch.dtype or dtype == self.dtype:
            return self.shape[0]
        fit = scratch.elements // self.shape[1:].numel()
        return max(fit // self.row_multiple, 1) * self.row_multiple


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
        out = scratch.take(data.shape, dtype) if scratch else None
        if out is None:
            out = torch.empty(data.shape, dtype=dtype, device=data.device)
        # Multiplied in float32 and rounded once.
        return torch.mul(data, self._scale.view(*data.shape[:-1], 1) / 127, out=out)


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
        out = scratch.take(shape, dtype) if scratch else None
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=self._packed.device)
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


def tracer_of(scratch: Scratch | None) -> Tracer:
    """Who times work that may use a scratch."""
    return NULL_TRACER if scratch is None else scratch.tracer


def parts_of(spec: WeightSpec, block: Tensor) -> dict[str, Tensor]:
    """The tensors that encode a weight, as views of its block."""
    return {
        role: _view(part, block)
        for role, part in spec.parts.items()
        if role not in ("state", "layout")
    }


def _view(part: TensorSpec, block: Tensor) -> Tensor:
    data = block[part.offset : part.offset + part.nbytes]
    return data.view(TORCH_DTYPES[part.dtype]).view(part.shape)


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
