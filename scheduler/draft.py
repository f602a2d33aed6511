"""A pass while it is put together."""

from heapq import heapreplace

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.plan import MicroBatch, Slice
from headrace.scheduler.policy import pack


class Draft:
    """The slices chosen so far and the room that is left for the next one.

    A slice is not split once chosen, so each is kept small enough for the emptiest micro-batch;
    whatever is let in can therefore be packed, and the whole budget can be used.
    """

    def __init__(self, config: SchedulerConfig, max_sequences: int) -> None:
        self._config = config
        self._max_sequences = max_sequences
        self._tokens = 0
        self._loads = [0] * config.micro_batches  # a heap of token counts
        self.slices: list[Slice] = []

    @property
    def room(self) -> int:
        """Tokens that the next slice may have; 0 when the pass is full."""
        if len(self.slices) == self._max_sequences:
            return 0
        return min(
            self._config.token_budget - self._tokens,
            self._config.micro_batch_tokens - self._loads[0],
        )

    def add(self, piece: Slice) -> None:
        size = len(piece.tokens)
        assert 0 < size <= self.room, (size, self.room)
        self._tokens += size
        heapreplace(self._loads, self._loads[0] + size)
        self.slices.append(piece)

    def pack(self) -> tuple[MicroBatch, ...]:
        if not self.slices:
            return ()
        return pack(self.slices, self._config.micro_batches, self._config.micro_batch_tokens)
