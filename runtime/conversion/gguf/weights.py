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
from headrace.runtime.conversion.source import Repacking, SourceTensor, SourceWeight, rows_at_once
from headrace.runtime.weights.small_floats import MX_BLOCK

PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}


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


def affine(name: str, kind: str, rows: Rows, heads: int) -> SourceWeight:
    block, columns = BLOCK_TYPES[kind], rows.shape[-1]
    data = Entry(name, "U8", (prod(rows.shape) // 2, 1))
    if block.bits == 8:
        data = Entry(name, "I8", (rows.count, columns))
    parts = [Part("data", data)]
    parts += [
        Part(role, Entry(f"{name}.{role}", dtype, (rows.count, count)))
        for role, dtype, count in block.parts(columns)
    ]
    source = ((parts[0], rows.data),)
    repacking = Repacking(tuple(parts), partial(_pieces, block, rows, heads))
    return SourceWeight(
        name, "int4" if block.bits == 4 else "int8g", rows.shape, source, None, repacking
    )


def _pieces(kind: BlockType, rows: Rows, heads: int) -> Iterator[tuple[str, Tensor]]:
    sides: dict[str, list[Tensor]] = {}
    for run in _trained(rows, heads):
        found = unpack(kind, run)
        for role, part in found.parts():
            sides.setdefault(role, []).append(part)
        yield "data", _packed(found.codes) if kind.bits == 4 else found.codes
    for role, runs in sides.items():
        yield role, torch.cat(runs)


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
