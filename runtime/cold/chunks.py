"""Where files are cut into chunks: at tensors' boundaries, so that equal tensors are equal chunks.

A model's stores that were made alike have their tensors at the same places. A chunk is of 1 to 8 MiB:
smaller tensors share one, and larger ones have several, counted from their own start.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from headrace.runtime.block_file import DTYPE_BYTES
from headrace.runtime.manifest import Block

MOST_BYTES = 8 << 20
LEAST_BYTES = 1 << 20

Run = tuple[int, int]
"""(bytes of one element, bytes in all): a stretch whose elements are of one size."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """`nbytes` bytes from `offset` of a file on, which are `runs` of elements."""

    offset: int
    nbytes: int
    runs: tuple[Run, ...]

    def plus(self, width: int, nbytes: int) -> "Chunk":
        runs = self.runs
        if runs and runs[-1][0] == width:
            runs = (*runs[:-1], (width, runs[-1][1] + nbytes))
        else:
            runs = (*runs, (width, nbytes))
        return replace(self, nbytes=self.nbytes + nbytes, runs=runs)


def cut_bytes(nbytes: int, offset: int = 0) -> list[Chunk]:
    """Of a file, or a part of one, that has no tensors."""
    starts = range(offset, offset + nbytes, MOST_BYTES)
    sizes = [min(MOST_BYTES, offset + nbytes - start) for start in starts]
    return [Chunk(start, n, ((1, n),)) for start, n in zip(starts, sizes, strict=True)]


def cut_block(block: Block) -> list[Chunk]:
    """Of a block's file: its header, then its data section."""
    return [*cut_bytes(block.data_offset), *_cut_data(block)]


def _cut_data(block: Block) -> Iterator[Chunk]:
    end = block.data_offset
    chunk = Chunk(end, 0, ())
    for width, nbytes in _spans(block):
        left = nbytes
        if chunk.nbytes and chunk.nbytes + left > MOST_BYTES:
            yield chunk
            chunk = Chunk(end, 0, ())
        while left > MOST_BYTES:
            yield chunk.plus(width, MOST_BYTES)
            left, end = left - MOST_BYTES, end + MOST_BYTES
            chunk = Chunk(end, 0, ())
        chunk, end = chunk.plus(width, left), end + left
        if chunk.nbytes >= LEAST_BYTES:
            yield chunk
            chunk = Chunk(end, 0, ())
    if chunk.nbytes:
        yield chunk


def _spans(block: Block) -> Iterator[Run]:
    """Each tensor with what lies between it and the next one, in the order of the file."""
    widths: dict[int, int] = {}
    for weight in block.weights.values():
        for part in weight.parts.values():
            if part.nbytes:
                widths[part.offset] = DTYPE_BYTES[part.dtype]
    starts = [0, *sorted(widths)[1:]]
    for start, end, (_, width) in zip(
        starts, [*starts[1:], block.nbytes], sorted(widths.items()), strict=True
    ):
        # What is no whole number of elements cannot be taken for them.
        yield (1 if (end - start) % width else width), end - start
