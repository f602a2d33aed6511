"""What the owners of a stage's memory hold, by name.

Each owner has a `memory()` that hands out its real tensors and mappings. The names are those of the
plan's StageMemory where it counts them, and what is not planned has a name of its own.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from torch import Tensor

from headrace.runtime.memory.message import Part
from headrace.runtime.memory.resident import Extents, resident_bytes

Holding = tuple[str, Tensor | np.ndarray]
"""A name, and memory. Several may have one name, and views of each other count once."""


class Owner(Protocol):
    """Who holds memory."""

    def memory(self) -> Iterable[Holding]: ...


def parts_of(holdings: Iterable[Holding]) -> tuple[Part, ...]:
    """The holdings by name, in the order of their names' first. What two names have counts for the first."""
    seen = {True: Extents(), False: Extents()}
    found: dict[tuple[str, bool], list[tuple[int, int]]] = defaultdict(list)
    for name, memory in holdings:
        on_device = isinstance(memory, Tensor) and memory.is_cuda
        found[name, on_device] += seen[on_device].add(*extent(memory))
    return tuple(
        Part(
            name,
            sum(size for _, size in extents),
            0 if on_device else resident_bytes(extents),
            on_device,
        )
        for (name, on_device), extents in found.items()
    )


def extent(memory: Tensor | np.ndarray) -> tuple[int, int]:
    """Address and bytes, of a view those of what it reaches over."""
    if isinstance(memory, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(memory)
        return int(low), int(high - low)
    if not memory.numel():
        return 0, 0
    reach = sum((n - 1) * step for n, step in zip(memory.shape, memory.stride(), strict=True)) + 1
    return memory.data_ptr(), reach * memory.element_size()


def named(name: str, memory: Iterable[Tensor | np.ndarray | None]) -> Iterator[Holding]:
    for one in memory:
        if one is not None and not (isinstance(one, Tensor) and one.is_meta):
            yield name, one
