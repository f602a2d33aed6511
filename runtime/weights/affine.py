"""Affine codes to values, written where the caller says, a few rows at a time.

A row's columns are in groups, each with a scale and, where it has one, a zero point or an offset:
(code - zero) * scale, or code * scale + offset. Products are made in float32 and rounded once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CENTRE = 8
"""The zero point of int4 codes that are stored without any."""

_CPU_ELEMENTS, _CUDA_ELEMENTS = 1 << 16, 1 << 23
"""Elements at a time: temporaries stay in a core's cache, and small beside a layer on a GPU."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """Scales or offsets [rows, groups], by rows: `values`, times those of `blocks` of groups where there are any
    [rows, blocks]."""

    values: Tensor
    blocks: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.values.shape[1]

    def of(self, run: slice) -> Tensor:
        """float32 [run, groups]."""
        values = self.values[run].float()
        if self.blocks is None:
            return values
        blocks = self.blocks[run].float()[..., None]
        return (values.view(*blocks.shape[:2], -1) * blocks).view(values.shape)


def row_runs(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Runs of the rows of a matrix whose temporaries are small."""
    most = _CUDA_ELEMENTS if device.type == "cuda" else _CPU_ELEMENTS
    step = max(1, most // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def nibbles(packed: Tensor) -> Tensor:
    """uint8 [rows, columns / 2], even column in the high nibble -> uint8 [rows, columns]."""
    codes = packed.new_empty(*packed.shape, 2)
    torch.bitwise_right_shift(packed, 4, out=codes[..., 0])
    torch.bitwise_and(packed, 15, out=codes[..., 1])
    return codes.view(len(packed), -1)


def int4_values(
    packed: Tensor, scale: Numbers, zero: Tensor | None, offset: Numbers | None, out: Tensor
) -> Tensor:
    """`packed` uint8 [rows, columns / 2]; `scale`, `zero` (uint8) and `offset` [rows, groups] into
    `out` [rows, columns], in its type. With neither zero nor offset, zero is 8."""
    rows, columns = out.shape
    for run in row_runs(rows, columns, out.device):
        some = out[run].view(-1, scale.groups, columns // scale.groups)
        codes = nibbles(packed[run]).view(some.shape)
        if offset is not None:
            _scaled(codes, scale.of(run), offset.of(run), some)
            continue
        # Differences are whole numbers below 256: exact in every type.
        if zero is None:
            some.copy_(codes).sub_(CENTRE)
        else:
            torch.sub(codes, zero[run].to(out.dtype)[..., None], out=some)
        _scaled(some, scale.of(run), None, some)
    return out


def int3_values(packed: Tensor, scale: Tensor, zero: Tensor, out: Tensor) -> Tensor:
    """`packed` uint8 [rows, 3 ceil(columns / 8)], `scale` and `zero` (uint8) [rows, groups] into `out` [rows, columns],
    in its type."""
    groups, columns = scale.shape[1], out.shape[1]
    for run in row_runs(len(scale), columns, out.device):
        some = out[run].view(-1, groups, columns // groups)
        codes = threes(packed[run])[:, :columns].reshape(some.shape)
        # Differences are whole numbers below 8: exact in every type.
        torch.sub(codes, zero[run].to(out.dtype)[..., None], out=some)
        _scaled(some, scale[run].float(), None, some)
    return out


def threes(packed: Tensor) -> Tensor:
    """uint8 [rows, 3 n], eight codes in three bytes, the first in the lowest bits -> uint8 [rows, 8 n]."""
    a, b, c = packed.view(len(packed), -1, 3).unbind(-1)
    # Codes 2 and 5 lie across two bytes.
    parts = (a, a >> 3, a >> 6 | b << 2, b >> 1, b >> 4, b >> 7 | c << 1, c >> 2, c >> 5)
    return torch.stack(parts, -1).bitwise_and_(7).view(len(packed), -1)


def int8_values(codes: Tensor, scale: Numbers, offset: Numbers | None, out: Tensor) -> Tensor:
    """`codes` int8 [rows, columns], `scale` and `offset` [rows, groups] into `out` [rows, columns]."""
    rows, columns = out.shape
    for run in row_runs(rows, columns, out.device):
        shape = (-1, scale.groups, columns // scale.groups)
        some = None if offset is None else offset.of(run)
        _scaled(codes[run].view(shape), scale.of(run), some, out[run].view(shape))
    return out


def _scaled(codes: Tensor, scale: Tensor, offset: Tensor | None, out: Tensor) -> None:
    wide = scale[..., None]
    if offset is None:
        torch.mul(codes, wide, out=out)
    else:
        out.copy_(torch.addcmul(offset[..., None], codes.float(), wide))
