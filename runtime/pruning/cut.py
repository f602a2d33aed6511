"""What is left of one tensor: rows, columns and weights, read from the checkpoint a run of rows at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from headrace.runtime.block_file import DTYPE_BYTES
from headrace.runtime.conversion.source import TensorBytes
from headrace.runtime.pruning.pattern import Pattern, zeroed

ROW_UNIT = 64
"""Runs of rows are whole multiples of it: then blocks of 4-bit formats end where runs do."""


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """`rows` and `columns` are indexes that stay, ascending; None: all. Vectors have rows only.

    With a `pattern`, weights of what stays become zero; `norms` are Wanda's, of all columns.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None
    pattern: Pattern | None = None
    norms: Tensor | None = None

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of what is left of a tensor of this shape."""
        rows, *rest = shape
        if self.columns is not None:
            rest[-1] = len(self.columns)
        return (rows if self.rows is None else len(self.rows), *rest)

    def apply(self, tensor: Tensor) -> Tensor:
        """What is left of a whole tensor [rows] or [rows, columns]."""
        if self.rows is not None:
            tensor = tensor.index_select(0, self.rows)
        return self.narrow(tensor) if tensor.dim() == 2 else tensor

    def narrow(self, rows: Tensor) -> Tensor:
        """What is left of rows [n, columns] that stay."""
        norms = self.norms
        if self.columns is not None:
            rows = rows.index_select(1, self.columns)
            norms = None if norms is None else norms[self.columns]
        return rows if self.pattern is None else zeroed(rows, self.pattern, norms)


@dataclass(frozen=True, slots=True, eq=False)
class CutTensor:
    """A tensor of the checkpoint [rows] or [rows, columns] as its cut leaves it; bytes are made as they are read."""

    source: TensorBytes
    cut: Cut

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.cut.shape(self.source.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def rows(self) -> Iterator[Tensor]:
        """Runs of whole rows as tensors [rows, columns]; each but the last has 64 n rows."""
        if len(self.source.shape) == 1:
            # A vector comes as one row.
            yield self.cut.apply(torch.cat([row[0] for row in self.source.rows()]))[None]
        else:
            yield from _in_units(self._left())

    def chunks(self) -> Iterator[memoryview]:
        for run in self.rows():
            yield run.contiguous().view(-1).view(torch.uint8).numpy().data

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def tensor(self) -> Tensor:
        """All of it, in memory."""
        return torch.cat([*self.rows()]).view(self.shape)

    def _left(self) -> Iterator[Tensor]:
        """What is left of each run of the source's rows."""
        first = 0
        for run in self.source.rows():
            if self.cut.rows is not None:
                here = (self.cut.rows >= first) & (self.cut.rows < first + len(run))
                picked = run.index_select(0, self.cut.rows[here] - first)
            else:
                picked = run
            first += len(run)
            yield self.cut.narrow(picked)


def _in_units(runs: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same rows in runs of 64 n, but for the last."""
    kept: Tensor | None = None
    for run in runs:
        run = run if kept is None else torch.cat([kept, run])
        whole = len(run) // ROW_UNIT * ROW_UNIT
        if whole:
            yield run[:whole]
        kept = run[whole:]
    if kept is not None and len(kept):
        yield kept
