"""The kernel of page_copies. Runs on CPUs with TRITON_INTERPRET=1."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Words of eight bytes that a program copies at a time."""

LINK_PROGRAMS = 64
"""Half a megabyte is on its way at once, several times what a link of 64 GB/s has under way, while most
of the device is left to what computes beside it."""

_PROGRAMS = 1024


@triton.jit(do_not_specialize=["tiles"])
def _copy_kernel(
    source, dest, sources, dests, source_stride, dest_stride, tiles, words,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th of `tiles` tiles of BLOCK words, page by page."""
    a_page = tl.cdiv(words, BLOCK)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        number = tile // a_page
        at = (tile - number * a_page) * BLOCK + tl.arange(0, BLOCK)
        there = at < words
        first = tl.load(sources + number).to(tl.int64) * source_stride
        to = tl.load(dests + number).to(tl.int64) * dest_stride
        tl.store(dest + to + at, tl.load(source + first + at, mask=there), mask=there)


def launch(
    source: Tensor, dest: Tensor, sources: Tensor, dests: Tensor, *, over_link: bool
) -> None:
    """Words [pages, words of a page] of both sides, rows apart by any number of words."""
    words = dest.shape[1]
    assert source.shape[1] == words and source.stride(1) == dest.stride(1) == 1
    tiles = len(sources) * triton.cdiv(words, _BLOCK)
    programs = min(tiles, LINK_PROGRAMS if over_link else _PROGRAMS)
    _copy_kernel[(programs,)](
        source, dest, sources, dests, source.stride(0), dest.stride(0), tiles, words, BLOCK=_BLOCK
    )
