"""Low-rank matrices on the device: what one linear layer has of every slot, and what a stage's have."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from headrace.runtime.adapters.host import HostFactors
from headrace.runtime.adapters.rows import Segment
from headrace.runtime.linear import QuantLinear
from headrace.runtime.memory.held import Holding, named


class RunningRows:
    """The segments of the micro-batch that runs; none between layers."""

    def __init__(self) -> None:
        self.segments: Sequence[Segment] = ()
        self.num_rows = 0

    @contextmanager
    def of(self, segments: Sequence[Segment], num_rows: int) -> Iterator[None]:
        self.segments, self.num_rows = segments, num_rows
        try:
            yield
        finally:
            self.segments = ()


class LinearAdapters:
    """What a linear layer [N, K] adds in rows with an adapter: scale * (x A^T) B^T.

    Of each slot there is A [rank, K] and B^T [rank, N], of `rank` at most, and the first rows of both count.
    """

    def __init__(
        self, linear: QuantLinear, slots: int, rank: int, rows: RunningRows, like: Tensor
    ) -> None:
        """Of the type and on the device of `like`."""
        self.a = like.new_empty(slots, rank, linear.in_features)
        self.b = like.new_empty(slots, rank, linear.out_features)
        self._ranks, self._scales, self._rows = [0] * slots, [0.0] * slots, rows

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y [..., N], the layer's own product of x [..., K], which has a row for each of the micro-batch's."""
        if not self._rows.segments:
            return y
        x = x.reshape(-1, x.shape[-1])
        out = y.reshape(-1, y.shape[-1])
        assert len(x) == self._rows.num_rows, "a linear layer with an adapter got other rows"
        for start, stop, slot in self._rows.segments:
            if rank := self._ranks[slot]:
                low = x[start:stop] @ self.a[slot, :rank].T
                out[start:stop].addmm_(low, self.b[slot, :rank], alpha=self._scales[slot])
        return out.view(y.shape)

    def put(self, slot: int, factors: HostFactors | None) -> None:
        """Have an adapter's matrices in a slot, queued on the current stream; None: it leaves the layer as it is."""
        self._ranks[slot] = 0
        if factors is not None:
            rank = len(factors.a)
            self.a[slot, :rank].copy_(factors.a, non_blocking=True)
            self.b[slot, :rank].copy_(factors.b, non_blocking=True)
            self._ranks[slot], self._scales[slot] = rank, factors.scale


class StageMatrices:
    """Slots for the adapters of a stage's linear layers, by their paths in the model."""

    def __init__(
        self,
        linears: Mapping[str, QuantLinear],
        slots: int,
        rank: int,
        rows: RunningRows,
        like: Tensor,
    ) -> None:
        self._of: dict[str, LinearAdapters] = {}
        for path, linear in linears.items():
            linear.adapters = LinearAdapters(linear, slots, rank, rows, like)
            self._of[path] = linear.adapters

    def put(self, slot: int, adapter: Mapping[str, HostFactors]) -> None:
        """Have an adapter in a slot that no row uses, queued on the current stream."""
        for path, own in self._of.items():
            own.put(slot, adapter.get(path))

    def memory(self) -> Iterable[Holding]:
        yield from named("adapters", [m for own in self._of.values() for m in (own.a, own.b)])


def like(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What tensors of a type on a device are made after."""
    return torch.empty(0, dtype=dtype, device=device)
