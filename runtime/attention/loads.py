"""What the attention kernels read: queries, and keys and values of plain pages, of tails, and those
just computed.

Runs on CPUs with TRITON_INTERPRET=1.
"""

# Kernels are Triton's dialect: their arguments are pointers and scalars of a launch.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def pages_of(table, tile, last, BLOCK_N: tl.constexpr, PAGE: tl.constexpr):
    """The page of a tile, or of each of its keys when it spans several; `last` is the last in use."""
    if BLOCK_N > PAGE:
        at = tile * (BLOCK_N // PAGE) + tl.arange(0, BLOCK_N) // PAGE
    else:
        at = tile * BLOCK_N // PAGE
    return tl.load(table + tl.minimum(at, last)).to(tl.int64)


@triton.jit
def load_queries(at, alive, dim, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers `dim` of queries; zeros of rows that are not alive, and from DIM on."""
    mask = alive[:, None] if DIM == BLOCK else alive[:, None] & (dim < DIM)[None, :]
    return tl.load(at + dim[None, :], mask=mask, other=0.0)


@triton.jit
def load_tile(
    pages, page, page_stride, tile, fresh, DTYPE: tl.constexpr, MASK: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Keys or values [BLOCK_N, BLOCK] of one head, as they are multiplied.

    `pages` points at the head's part of page 0. MASK: rows that are not fresh are zeros.
    """
    n = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK)
    if BLOCK_N > PAGE:
        at = (pages + page * page_stride + n % PAGE * DIM)[:, None] + dim[None, :]
    else:
        first = pages + page * page_stride + tile * BLOCK_N % PAGE * DIM
        at = first + n[:, None] * DIM + dim[None, :]
    if MASK and DIM < BLOCK:
        stored = tl.load(at, mask=fresh[:, None] & (dim < DIM)[None, :], other=0)
    elif MASK:
        stored = tl.load(at, mask=fresh[:, None], other=0)
    elif DIM < BLOCK:
        stored = tl.load(at, mask=(dim < DIM)[None, :], other=0)
    else:
        stored = tl.load(at)
    return stored.to(DTYPE)


@triton.jit
def load_exact(
    x, x_token, tail, first, begin, total, key, dim, DIM: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """Numbers `dim` of keys or values `key` of one head, as computed; zeros where there are none.

    Those of positions [begin, total) are rows `first` and on of `x`, those before, as far as they are
    in the page of `begin`, in the sequence's tail.
    """
    new = ((key >= begin) & (key < total))[:, None]
    past = ((key >= begin // PAGE * PAGE) & (key < begin))[:, None]
    row = (first + key - begin).to(tl.int64) * x_token
    at = tl.where(new, x + row[:, None], tail + (key % PAGE * DIM)[:, None])
    return tl.load(at + dim[None, :], mask=(new | past) & (dim < DIM)[None, :], other=0.0)
