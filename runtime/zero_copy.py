"""Pinned host memory that the device itself reads and writes, over the link and by kernels.

The copy engine that brings weights takes what is queued in turn, so that a copy of a few bytes can wait
for hundreds of megabytes. A kernel waits for none of them. Runs on CPUs with TRITON_INTERPRET=1.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
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


@triton.jit(do_not_specialize=["count"])
def _store_kernel(x, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < count), mask=at < count)


def gather(table: Tensor, tokens: Tensor, out: Tensor) -> None:
    """out [T, hidden] from table [vocabulary, hidden] by tokens [T], both of them pinned."""
    rows, width = out.shape
    assert table.is_contiguous() and out.is_contiguous()
    _gather_kernel[(rows, triton.cdiv(width, _BLOCK))](
        table, tokens, out, WIDTH=width, BLOCK=_BLOCK
    )


def store(x: Tensor, out: Tensor) -> None:
    """Write x to `out`, pinned, of its type and shape; it is there when the stream has come so far."""
    assert (x.dtype, x.shape) == (out.dtype, out.shape) and out.is_contiguous()
    count = x.numel()
    _store_kernel[(triton.cdiv(count, _BLOCK),)](x.contiguous(), out, count, BLOCK=_BLOCK)


def read_back(x: Tensor) -> list[Any]:
    """x.tolist() of a CUDA tensor; waits for what is queued on the current stream."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    store(x, host)
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    return host.tolist()
