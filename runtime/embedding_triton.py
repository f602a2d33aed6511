"""Rows of a table in pinned host memory, read by the device itself; see embedding.

Runs on CPUs with TRITON_INTERPRET=1.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _gather_kernel(table, tokens, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row)
    values = tl.load(table + token * WIDTH + at, mask=at < WIDTH)
    tl.store(out + row * WIDTH + at, values.to(out.dtype.element_ty), mask=at < WIDTH)


def gather(table: Tensor, tokens: Tensor, out: Tensor) -> None:
    """out [T, hidden] from table [vocabulary, hidden], pinned, by tokens [T] on the device."""
    rows, width = out.shape
    assert table.is_contiguous() and out.is_contiguous()
    _gather_kernel[(rows, triton.cdiv(width, _BLOCK))](
        table, tokens, out, WIDTH=width, BLOCK=_BLOCK
    )
