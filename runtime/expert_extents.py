"""Where a block's routed experts lie, so that each can be read alone."""

import re
from dataclasses import dataclass
from itertools import pairwise

from headrace.runtime.manifest import ALIGN_BLOCK, Block, WeightSpec

_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` bytes from `offset` of a data section on; both multiples of 4096, so that it is one
    direct read. Extents of neighbours may share the page in which one ends and the other begins."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SplitBlock:
    """A block as the bytes that every token needs, from its start on, and one extent an expert."""

    dense: Extent
    experts: tuple[Extent, ...]


def split_block(block: Block) -> SplitBlock | None:
    """None for a block without experts, or whose experts do not lie one after another at its end:
    matrices of all experts in one stack, or a store in which other weights follow them."""
    spans: dict[int, list[tuple[int, int]]] = {}
    dense_end = 0
    for name, spec in block.weights.items():
        found = _EXPERT.search(name)
        if found:
            spans.setdefault(int(found[1]), []).append(_span(spec))
        else:
            dense_end = max(dense_end, _span(spec)[1])
    if not spans or sorted(spans) != list(range(len(spans))):
        return None
    ends = [(min(s for s, _ in spans[e]), max(t for _, t in spans[e])) for e in sorted(spans)]
    in_order = all(here[1] <= following[0] for here, following in pairwise(ends))
    if not in_order or dense_end > ends[0][0]:
        return None
    return SplitBlock(_extent(0, dense_end), tuple(_extent(start, end) for start, end in ends))


def _span(spec: WeightSpec) -> tuple[int, int]:
    parts = spec.parts.values()
    return min(p.offset for p in parts), max(p.offset + p.nbytes for p in parts)


def _extent(start: int, end: int) -> Extent:
    first = start // ALIGN_BLOCK * ALIGN_BLOCK
    return Extent(first, -(-end // ALIGN_BLOCK) * ALIGN_BLOCK - first)
