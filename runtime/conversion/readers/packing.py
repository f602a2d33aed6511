"""Codes in words and bytes, and weights whose parts are made of them."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from headrace.runtime.block_file import Entry
from headrace.runtime.conversion.part import Part
from headrace.runtime.conversion.source import (
    Pieces,
    Repacking,
    SourceTensor,
    SourceWeight,
    rows_at_once,
)
from headrace.scheduler.errors import StoreError

UNREADABLE = "convert the original, unquantized checkpoint, or quantize it again so"


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, words], the first code in the lowest bits -> uint8 [rows, words * 32 / bits].

    4 or 8 bits: words are little-endian, as safetensors are.
    """
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data
    return torch.stack((data & 15, data >> 4), dim=-1).view(len(data), -1)


def pack(codes: Tensor) -> Tensor:
    """uint8 codes [rows, columns] below 16 -> [rows, columns / 2], the even column in the high nibble."""
    return codes[:, 0::2] << 4 | codes[:, 1::2]


def runs(rows: int, columns: int) -> Iterator[slice]:
    """Runs of rows that are repacked at a time."""
    step = rows_at_once(columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def repacked(
    name: str,
    fmt: str,
    shape: tuple[int, ...],
    data: SourceTensor,
    others: Mapping[str, tuple[str, tuple[int, ...]]],
    pieces: Pieces,
    state: Mapping[str, Any] | None = None,
) -> SourceWeight:
    """A weight whose parts are its data and `others` (type and shape by role), in this order.

    `data` is the tensor that holds its codes.
    """
    rows, columns = prod(shape[:-1]), shape[-1]
    packed = fmt in ("int4", "mxfp4", "nvfp4")
    dtype = {"int8g": "I8", "fp8": "F8_E4M3"}.get(fmt, "U8")
    first = Entry(name, dtype, (rows * columns // 2, 1) if packed else (rows, columns))
    parts = [Part("data", first)]
    parts += [Part(r, Entry(f"{name}.{r}", t, s)) for r, (t, s) in others.items()]
    source = (Part("data", Entry(name, data.dtype, data.shape)), data)
    return SourceWeight(name, fmt, shape, (source,), state, Repacking(tuple(parts), pieces))


def needed(tensors: Mapping[str, SourceTensor], name: str, kind: str) -> SourceTensor:
    """A tensor that a quantized weight must have. StoreError when the checkpoint lacks it."""
    if name not in tensors:
        raise StoreError(
            f"the checkpoint lacks {name}, without which its {kind} weight means nothing"
        )
    return tensors[name]


def column_order(index: Tensor, groups: int, name: str) -> Tensor | None:
    """int32 [columns]: the columns, group by group, where `index` [columns] has each one's group;
    None where they lie so already.

    Raises StoreError when groups differ in size.
    """
    size = len(index) // groups
    expected = torch.arange(groups).repeat_interleave(size)
    if len(index) == len(expected) and torch.equal(index.long(), expected):
        return None
    order = torch.argsort(index.long(), stable=True)
    if len(index) != len(expected) or not torch.equal(index.long()[order], expected):
        raise StoreError(
            f"{name} puts columns into groups of different sizes, which is not read here; "
            f"{UNREADABLE} that every group has as many columns (static groups, or no act-order)"
        )
    return order.int()
