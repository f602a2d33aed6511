"""What becomes of a GGUF file's tensors in a store."""

from collections.abc import Iterator
from functools import partial
from math import prod

import torch
from torch import Tensor

from headrace.runtime.block_file import Entry
from headrace.runtime.conversion.gguf.blocks import BLOCK_TYPES, BlockType, unpack, unpack_mxfp4
from headrace.runtime.conversion.gguf.naming import as_trained
from headrace.runtime.conversion.part import Part
from headrace.runtime.conversion.source import (
    Repacking,
    Rounding,
    SourceTensor,
    SourceWeight,
    rows_at_once,
)
from headrace.runtime.weights.small_floats import MX_BLOCK

PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
DECODED = "F16"
"""What quantized tensors become that are no matrices of layers: their scales are float16."""


class Rows:
    """The bytes of a quantized matrix, some rows at a time."""

    def __init__(self, data: SourceTensor, shape: tuple[int, ...]) -> None:
        self.data, self.shape = data, shape
        self.count = prod(shape[:-1])
        self.row_bytes = data.nbytes // self.count

    def runs(self, rows_together: int = 1) -> Iterator[Tensor]:
        """uint8 [rows, row_bytes]; every run but the last has 64 n rows, and whole groups of `rows_together`."""
        step = rows_at_once(self.row_bytes)
        step = -(-step // rows_together) * rows_together
        for first in range(0, self.count, step):
            size = min(step, self.count - first) * self.row_bytes
            offset = self.data.offset + first * self.row_bytes
            part = SourceTensor(self.data.file, "U8", (size,), offset, size)
            yield part.tensor().view(-1, self.row_bytes)


def plain(name: str, source: SourceTensor, heads: int, *, minus_one: bool) -> SourceWeight:
    part = Part("data", Entry(name, source.dtype, source.shape))
    if not heads and not minus_one:
        return SourceWeight(name, "raw", source.shape, ((part, source),))

    def pieces() -> Iterator[tuple[str, Tensor]]:
        values = source.tensor()
        yield "data", as_trained(values, heads) if heads else values - 1

    return SourceWeight(
        name, "raw", source.shape, ((part, source),), None, Repacking((part,), pieces)
    )


def decoded(name: str, kind: str, rows: Rows) -> SourceWeight:
    """As float16 values."""
    part = Part("data", Entry(name, DECODED, rows.shape))
    source = SourceTensor(rows.data.file, DECODED, rows.shape, rows.data.offset, rows.data.nbytes)
    rounding = Rounding(kind)

    def pieces() -> Iterator[tuple[str, Tensor]]:
        rounding.clear()
        for run in rows.runs():
            values = unpack(BLOCK_TYPES[kind], run).values()
            rounded = values.half()
            rounding.add(float(values.square().sum()), float((rounded - values).square().sum()))
            yield "data", rounded

    repacking = Repacking((part,), pieces, rounding)
    return SourceWeight(name, "raw", rows.shape, ((part, source),), None, repacking)


def affine(name: str, kind: str, rows: Rows, heads: int) -> SourceWeight:
    block = BLOCK_TYPES[kind]
    each = (rows.count, rows.shape[-1] // block.group)
    data = Entry(name, "U8", (prod(rows.shape) // 2, 1))
    if block.bits == 8:
        data = Entry(name, "I8", (rows.count, rows.shape[-1]))
    parts = [Part("data", data), Part("scale", Entry(f"{name}.scale", "F16", each))]
    if block.has_offset:
        parts.append(Part("offset", Entry(f"{name}.offset", "F16", each)))
    source = ((parts[0], rows.data),)
    rounding = Rounding(kind)
    repacking = Repacking(tuple(parts), partial(_pieces, block, rows, heads, rounding), rounding)
    fmt = "int4" if block.bits == 4 else "int8g"
    return SourceWeight(name, fmt, rows.shape, source, None, repacking)


def _pieces(
    kind: BlockType, rows: Rows, heads: int, rounding: Rounding
) -> Iterator[tuple[str, Tensor]]:
    rounding.clear()
    scales, offsets = [], []
    for run in _trained(rows, heads):
        found = unpack(kind, run)
        if found.scale.dtype == torch.float32:
            rounding.add(*found.squares())
        scales.append(found.scale.half())
        if found.offset is not None:
            offsets.append(found.offset.half())
        yield "data", _packed(found.codes) if kind.bits == 4 else found.codes
    yield "scale", torch.cat(scales)
    if offsets:
        yield "offset", torch.cat(offsets)


def mxfp4(name: str, rows: Rows, heads: int) -> SourceWeight:
    scales = (rows.count, rows.shape[-1] // MX_BLOCK)
    parts = (
        Part("data", Entry(name, "U8", (prod(rows.shape) // 2, 1))),
        Part("scale", Entry(f"{name}.scale", "U8", scales)),
    )

    def pieces() -> Iterator[tuple[str, Tensor]]:
        exponents = []
        for run in _trained(rows, heads):
            codes, exponent = unpack_mxfp4(run)
            exponents.append(exponent)
            yield "data", _packed(codes)
        yield "scale", torch.cat(exponents)

    source = ((parts[0], rows.data),)
    return SourceWeight(name, "mxfp4", rows.shape, source, None, Repacking(parts, pieces))


def _trained(rows: Rows, heads: int) -> Iterator[Tensor]:
    """Runs of rows, in the order of the model as it was trained."""
    together = rows.count // heads if heads else 1
    for run in rows.runs(together):
        yield as_trained(run, len(run) // together) if heads else run


def _packed(codes: Tensor) -> Tensor:
    """Two a byte, the even one in the high nibble."""
    pairs = codes.reshape(-1, 2)
    return pairs[:, :1] << 4 | pairs[:, 1:]
