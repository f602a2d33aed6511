"""What a stored weight can do, whatever its format: give rows, be dequantized, be multiplied by.

Packed bytes stay packed. Few rows on CUDA go to a fused 4-bit kernel, ours or bitsandbytes'; otherwise
a run of output rows is dequantized into a reused scratch buffer and multiplied there.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from headrace.runtime.matmul.configs import Codes, Packing
from headrace.runtime.matmul.few_rows import multiply
from headrace.runtime.product import product
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer


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


def room_for(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scratch: Scratch | None
) -> Tensor:
    """Where values are dequantized to: the scratch, if it can serve, else memory of its own."""
    taken = scratch.take(shape, dtype) if scratch else None
    return torch.empty(shape, dtype=dtype, device=device) if taken is None else taken


class Weight(ABC):
    """A logical weight of `shape`, backed by views of a block's bytes."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = torch.Size(shape)

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What the bytes are stored as."""

    @property
    def row_multiple(self) -> int:
        """`rows` may start at multiples of this."""
        return 1

    @property
    def packing(self) -> Packing | None:
        """How `codes` lie, by which kernels multiply few rows; None where there are none for it."""
        return None

    def codes(self) -> Codes:
        """What kernels are given."""
        raise NotImplementedError

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
        fused = multiply(x, [self], [bias], tracer_of(scratch))
        if fused is not None:
            return fused[0]
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
        return multiply(x, [self, *others], biases, tracer_of(scratch))

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


def tracer_of(scratch: Scratch | None) -> Tracer:
    """Who times work that may use a scratch."""
    return NULL_TRACER if scratch is None else scratch.tracer
