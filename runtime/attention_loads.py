"""What the attention kernels read: keys and values of pages, tails, and those just computed.

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
def load_tile(
    pages, scales, page, page_stride, tile, fresh, DTYPE: tl.constexpr, MASK: tl.constexpr,
    BITS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Keys or values [BLOCK_N, BLOCK] of one head, as they are multiplied.

    Whatever pages hold is read and decoded here. `pages` and `scales` point at the head's part of
    page 0; BITS is 16 where pages hold numbers. MASK: rows that are not fresh are zeros.
    """
    n = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK)
    WIDTH: tl.constexpr = DIM // 2 if BITS == 4 else DIM
    # Both halves of a key are in the same bytes.
    place = dim % WIDTH if BITS == 4 else dim
    if BLOCK_N > PAGE:
        at = (pages + page * page_stride + n % PAGE * WIDTH)[:, None] + place[None, :]
    else:
        first = pages + page * page_stride + tile * BLOCK_N % PAGE * WIDTH
        at = first + n[:, None] * WIDTH + place[None, :]
    if MASK and DIM < BLOCK:
        stored = tl.load(at, mask=fresh[:, None] & (dim < DIM)[None, :], other=0)
    elif MASK:
        stored = tl.load(at, mask=fresh[:, None], other=0)
    elif DIM < BLOCK:
        stored = tl.load(at, mask=(dim < DIM)[None, :], other=0)
    else:
        stored = tl.load(at)
    if BITS > 8:
        number = stored
    else:
        # A page's stride is in bytes.
        at = scales + page * (page_stride // 2) + (tile * BLOCK_N + n) % PAGE
        number = _decode(stored, at, fresh, dim, BITS, DIM, PAGE)
    return number.to(DTYPE)


@triton.jit
def _decode(
    stored, scales, fresh, dim, BITS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """Codes to float32; `scales` are the places of the keys' steps. The lowest numbers follow these."""
    step = tl.load(scales, mask=fresh, other=0.0).to(tl.float32)[:, None]
    if BITS == 8:
        number = stored.to(tl.float32) * step
    else:
        shift = (dim // (DIM // 2) * 4).to(tl.uint8)[None, :]
        lowest = tl.load(scales + PAGE, mask=fresh, other=0.0).to(tl.float32)[:, None]
        number = ((stored >> shift) & 15).to(tl.float32) * step + lowest
        if dim.shape[0] > DIM:
            number = tl.where((dim < DIM)[None, :], number, 0.0)
    return number


@triton.jit
def load_exact(
    x, x_token, tail, first, begin, total, key, dim, DIM: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """Numbers `dim` of keys or values `key` of one head, as computed; zeros where there are none.

    Those of positions [begin, total) are rows `first` and on of `x`, those before, as far as they are
    in the page of `begin`, in the sequence's tail.
    """
    new = (key >= begin) & (key < total)
    past = (key >= begin // PAGE * PAGE) & (key < begin)
    inside = (dim < DIM)[None, :]
    row = (first + key - begin).to(tl.int64) * x_token
    mine = tl.load(x + row[:, None] + dim[None, :], mask=new[:, None] & inside, other=0.0)
    at = tail + (key % PAGE * DIM)[:, None] + dim[None, :]
    kept = tl.load(at, mask=past[:, None] & inside, other=0.0)
    return tl.where(new[:, None], mine, kept)
