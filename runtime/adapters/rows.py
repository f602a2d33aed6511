"""Which rows of a micro-batch run with which adapter."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from headrace.scheduler.plan import Slice


class Segment(NamedTuple):
    """Packed rows [start, stop) run with the adapter in `slot`."""

    start: int
    stop: int
    slot: int


def segments_of(slices: Sequence[Slice]) -> tuple[Segment, ...]:
    """One for slices of one adapter that stand side by side, none for those without."""
    made, end = [], 0
    for slot, some in groupby(slices, lambda piece: piece.adapter):
        start, end = end, end + sum(len(piece.tokens) for piece in some)
        if slot is not None:
            made.append(Segment(start, end, slot))
    return tuple(made)
