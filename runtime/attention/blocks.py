"""Which rows and which keys a program of the attention kernels takes.

Runs on CPUs with TRITON_INTERPRET=1.
"""

# Kernels are Triton's dialect: their arguments are pointers and scalars of a launch.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

_CHUNK = tl.constexpr(256)


@triton.jit
def find_sequence(query_start, num_sequences, block, BLOCK_Q: tl.constexpr):
    """The sequence that owns a block: s owns those from query_start[s] // BLOCK_Q + s on.

    Counted, since the loads of a binary search would wait for each other.
    """
    found = block * 0 - 1
    for start in tl.range(0, num_sequences, _CHUNK, num_stages=1):
        sequence = start + tl.arange(0, _CHUNK)
        there = sequence < num_sequences
        first = tl.load(query_start + sequence, mask=there, other=0) // BLOCK_Q + sequence
        found += tl.sum((there & (first <= block)).to(tl.int32), 0)
    return found


@triton.jit
def locate(
    query_start, num_sequences, block, BLOCK_Q: tl.constexpr, ONE: tl.constexpr, SKIP: tl.constexpr
):  # fmt: skip
    """A block's sequence, its first token's row, its length, and the block's first query.

    ONE: block b is sequence b's only one; those of more than SKIP tokens are left out (length 0).
    Otherwise those of at most SKIP tokens are left out, and so are blocks past the end.
    """
    if ONE:
        sequence = block
        query = block * 0
    else:
        sequence = find_sequence(query_start, num_sequences, block, BLOCK_Q)
        query = (block - tl.load(query_start + sequence) // BLOCK_Q - sequence) * BLOCK_Q
    first = tl.load(query_start + sequence)
    length = tl.load(query_start + sequence + 1) - first
    if ONE:
        length = tl.where(length > SKIP, 0, length)
    else:
        length = tl.where((length <= SKIP) | (query >= length), 0, length)
    return sequence, first, length, query


@triton.jit
def share_of(first, last, part, parts):
    """A part's tiles of [first, last)."""
    count = last - first
    return first + part * count // parts, first + (part + 1) * count // parts
