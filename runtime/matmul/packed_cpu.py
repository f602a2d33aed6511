"""4-bit weights in the order in which bitsandbytes' kernel for CPUs with AVX-512 bf16 reads them.

A group of 32 rows becomes K / 2 runs of 32 bytes, one for each pair of columns (k, k + 1): byte
2 n + j has row n's value at column k + j in its low nibble and row n + 16's in its high one. Scales
are bfloat16 [K / blocksize, N]. So a weight takes the bytes that it took before, and is repacked
where it lies; scales that are quantized themselves stay as they are and are decoded at each use.

Only layers that stay are repacked. For one that is streamed, once for each use, repacking takes
longer than the dequantizing that it saves (8192 x 2048, one thread of a Xeon with AMX: 8 ms, and
4 ms).
"""

import ctypes
import logging
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.runtime.bnb import functional, lib
from headrace.runtime.manifest import WeightSpec
from headrace.runtime.weights.dequantize import dequantize_4bit
from headrace.runtime.weights.four_bit import FourBitWeight
from headrace.runtime.weights.view import parts_of, view_weight
from headrace.runtime.weights.weight import Scratch, Weight, room_for

log = logging.getLogger(__name__)

GROUP = 32
"""Rows that are interleaved."""

CHUNK_BYTES = 512 << 10
"""Bytes reordered at a time, which with their temporaries stay in a core's cache."""

FEW_SEQUENCES = 8
"""Decoding at most so many sequences, the kernel is faster than dequantizing stored bytes and
multiplying. Measured on a Xeon with AMX, in one thread, as was MOST_ROWS. Neither is measured again at
each start: the choice changes the last bits of results, and a resumed job repeats its rows."""

MOST_ROWS = 32
"""Up to so many rows the kernel is faster than putting packed bytes back in order and multiplying."""


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Makes packed weights. `rows` is the most rows that their kernel is used for."""

    rows: int

    def takes(self, spec: WeightSpec) -> bool:
        """Whether a weight has the kernel's shape: whole groups of rows, whole blocks of columns."""
        return (
            spec.format in ("nf4", "fp4")
            and len(spec.shape) in (2, 3)
            and spec.shape[-2] % GROUP == 0
            and spec.shape[-1] % spec.blocksize == 0
        )

    def pack(self, spec: WeightSpec, block: Tensor) -> None:
        """Repack a weight in the bytes of its block. Once: its bytes do not say that they are."""
        parts = parts_of(spec, block)
        columns = spec.shape[-1]
        data = parts["data"].view(-1, GROUP, columns // 2)
        step = max(1, CHUNK_BYTES // data[0].nbytes)
        for some in data.split(step):
            some.copy_(_interleaved(some).view(some.shape))
        if "nested_absmax" not in parts:
            scales = parts["absmax"].view(-1, spec.shape[-2], columns // spec.blocksize)
            turned = scales.mT.to(torch.bfloat16, copy=True).contiguous()
            _bf16_scales(spec, parts).copy_(turned)

    def view(self, spec: WeightSpec, block: Tensor) -> Weight:
        """The weight at `spec` in a block whose weights of the kernel's shape have been packed."""
        if not self.takes(spec):
            return view_weight(spec, block)
        return PackedWeight(spec, parts_of(spec, block), self.rows)


class PackedWeight(FourBitWeight):
    """A packed weight. Many rows are multiplied with its values, put back in order piece by piece."""

    def __init__(self, spec: WeightSpec, parts: dict[str, Tensor], rows: int) -> None:
        super().__init__(spec, parts)
        self._most_rows = rows
        self._call: _Call | None = None
        nested = "nested_absmax" in parts
        self._by_block = (
            None if nested else _bf16_scales(spec, parts)
        )  # [experts, K / blocksize, N]

    @property
    def row_multiple(self) -> int:
        return GROUP if len(self.shape) == 2 else 1

    def rows(self, start: int, stop: int) -> Weight:
        assert start % self.row_multiple == stop % self.row_multiple == 0, (start, stop, self.shape)
        row = self.shape[1:].numel()
        piece = copy(self)
        piece._call = None
        piece.shape = torch.Size((stop - start, *self.shape[1:]))
        piece._first = self._first + start * row
        piece._packed = self._packed[start * row // 2 : stop * row // 2]
        if self._by_block is not None:
            axis = 0 if len(self.shape) == 3 else 2
            piece._by_block = self._by_block.narrow(axis, start, stop - start)
        return piece

    def _scales(self) -> Tensor:
        if self._by_block is None:
            return super()._scales()
        return self._by_block.mT.float().reshape(-1)

    def _scales_by_block(self) -> Tensor:
        """bfloat16 [K / blocksize, N] of a matrix."""
        if self._by_block is not None:
            return self._by_block[0].contiguous()
        scales = super()._scales().view(self.shape[-2], -1)
        return scales.T.to(torch.bfloat16).contiguous()

    def dense(self, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
        out = room_for(tuple(self.shape), dtype, torch.device("cpu"), scratch)
        spec, columns = self._spec, self.shape[-1]
        groups = self._packed.view(-1, GROUP, columns // 2)
        scales = self._scales().view(len(groups), -1)
        step = max(1, CHUNK_BYTES // groups[0].nbytes)
        values = out.view(len(groups), GROUP, columns)
        for i in range(0, len(groups), step):
            piece = values[i : i + step]
            ordered = _rows_apart(groups[i : i + step]).view(-1, 1)
            shape = (piece.shape[0] * GROUP, columns)
            some = scales[i : i + step].reshape(-1)
            dequantize_4bit(ordered, some, spec.blocksize, spec.format, shape, piece.view(shape))
        return out

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        scratch: Scratch | None = None,
        transposed: bool = False,
    ) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if transposed or x.dtype != torch.bfloat16 or not 0 < rows <= self._most_rows:
            return super().linear(x, bias, scratch, transposed)
        call = self._call or _Call(self._spec, self.shape, self._packed, self._scales_by_block())
        if self._by_block is not None:
            self._call = call  # else its scales, decoded for this use, would stay
        out = call(x.contiguous(), rows)
        return out if bias is None else out.add_(bias)


class _Call:
    """bitsandbytes' product by one matrix, with the arguments that do not change made once."""

    def __init__(self, spec: WeightSpec, shape: torch.Size, packed: Tensor, scales: Tensor) -> None:
        self._kernel = getattr(lib, f"gemv_4bit_inference_cpu_{spec.format}_bf16")
        self._count, _ = shape
        self._n, self._k = map(ctypes.c_int64, shape)
        self._held = packed, scales  # what the pointers are to
        self._data, self._scales = (ctypes.c_void_p(held.data_ptr()) for held in self._held)
        self._blocksize = ctypes.c_int64(spec.blocksize)

    def __call__(self, x: Tensor, rows: int) -> Tensor:
        """bfloat16 [..., K], contiguous, to [..., N]."""
        out = x.new_empty((*x.shape[:-1], self._count))
        self._kernel(
            ctypes.c_int64(rows),
            self._n,
            self._k,
            ctypes.c_void_p(x.data_ptr()),
            self._data,
            self._scales,
            ctypes.c_void_p(out.data_ptr()),
            self._blocksize,
            self._k,
            self._n,
        )
        return out


def _bf16_scales(spec: WeightSpec, parts: dict[str, Tensor]) -> Tensor:
    """[experts, K / blocksize, N], the first half of the bytes of the float32 scales."""
    *stack, count, columns = spec.shape
    shape = (stack[0] if stack else 1, columns // spec.blocksize, count)
    whole = parts["absmax"].view(-1).view(torch.bfloat16)
    return whole[: len(whole) // 2].view(shape)


def _interleaved(rows: Tensor) -> Tensor:
    """Canonical bytes [groups, 32, K / 2] (even column in the high nibble) to packed ones."""
    groups, _, pairs = rows.shape
    first, second = rows.view(groups, 2, 16, pairs).unbind(1)
    even = (first >> 4) | (second & 0xF0)
    odd = (first & 0x0F) | (second << 4)
    words = even.to(torch.int16) | (odd.to(torch.int16) << 8)  # little-endian: byte 0 is even
    return words.transpose(1, 2).contiguous().view(torch.uint8)


def _rows_apart(packed: Tensor) -> Tensor:
    """The inverse of `_interleaved`: [groups, 32, K / 2] canonical bytes."""
    groups, _, pairs = packed.shape
    words = packed.view(torch.int16).view(groups, pairs, 16).transpose(1, 2).contiguous()
    out = packed.new_empty(groups, 2, 16, pairs)
    for half in (0, 1):
        nibbles = (words >> 4 if half else words) & 0x0F0F
        # The even column's nibble moves up, the odd one's down beside it; what is above is cut off.
        out[:, half] = torch.add(nibbles >> 8, nibbles, alpha=16)
    return out.view(groups, GROUP, pairs)


def choose_layout(device: torch.device, dtype: torch.dtype, sequences: int) -> PackedLayout | None:
    """The packed layout where it pays for decoding `sequences` sequences, else None. Logs why."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return None
    if not has_kernel():
        log.info("4-bit weights stay in their order: no AVX-512 bf16, or no kernel for it")
        return None
    if sequences > FEW_SEQUENCES:
        log.info(
            "4-bit weights stay in their order: the packed kernel is faster up to %d sequences, and "
            "passes decode up to %d (--max-sequences)",
            FEW_SEQUENCES,
            sequences,
        )
        return None
    log.info("4-bit resident weights are packed for the CPU's kernel")
    return PackedLayout(MOST_ROWS)


def has_kernel() -> bool:
    """Whether this CPU has AVX-512 bf16 and the bitsandbytes library in use was built for it."""
    return bool(functional.has_avx512bf16())
