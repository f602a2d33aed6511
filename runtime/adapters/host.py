"""Adapters in host memory: those that were on the device last, as many as fit."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from headrace.runtime.memory.held import Holding, named


class HostFactors(NamedTuple):
    """A [rank, K] and B^T [rank, N] of one linear layer, in the compute type; pinned for a CUDA device."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


HostAdapter = Mapping[str, HostFactors]
"""A stage's part of an adapter, by the paths of linear layers."""


class HostAdapters:
    """Keeps adapters by their digests, in `most` bytes: the least recently used one goes first.

    One thread calls it.
    """

    def __init__(self, most: int) -> None:
        self._most, self._used = most, 0
        self._kept: OrderedDict[str, HostAdapter] = OrderedDict()

    def find(self, digest: str) -> HostAdapter | None:
        if digest in self._kept:
            self._kept.move_to_end(digest)
        return self._kept.get(digest)

    def keep(self, digest: str, adapter: HostAdapter) -> None:
        """Keep what is not here, if it is not larger than all the room there is."""
        size = nbytes_of(adapter)
        if digest in self._kept or size > self._most:
            return
        while self._used + size > self._most:
            _, gone = self._kept.popitem(last=False)
            self._used -= nbytes_of(gone)
        self._kept[digest] = adapter
        self._used += size

    def memory(self) -> Iterable[Holding]:
        every = [factors for adapter in self._kept.copy().values() for factors in adapter.values()]
        yield from named("host_adapters", [m for factors in every for m in (factors.a, factors.b)])


def nbytes_of(adapter: HostAdapter) -> int:
    """Of all its matrices."""
    return sum(factors.nbytes for factors in adapter.values())
