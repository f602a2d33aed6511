"""A pass while it is put together."""

from heapq import heapreplace

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.plan import MicroBatch, Slice
from headrace.scheduler.policy import pack


class Draft:
    """The slices chosen so far and the room that is left for the next one.

    Each slice is kept small enough for the emptiest micro-batch; whatever is let in can therefore be
    packed whole, and the whole budget can be used. Slices with cold
    pages have micro-batches of their own, and stay in those that they were let into.
    """

    def __init__(self, config: SchedulerConfig, max_sequences: int) -> None:
        self._config = config
        self._max_sequences = max_sequences
        self._tokens = 0
        self._loads = [0] * config.micro_batches  # a heap of token counts
        self._cold = ColdBatches(config)
        self._warm: list[Slice] = []

    @property
    def num_slices(self) -> int:
        return len(self._warm) + self._cold.num_slices

    @property
    def left(self) -> int:
        """Tokens that are left of the pass's budget; 0 when it has all the sequences it may have."""
        if self.num_slices == self._max_sequences:
            return 0
        return self._config.token_budget - self._tokens

    @property
    def room(self) -> int:
        """Tokens that the next slice on the device may have; 0 when there is no room for it."""
        return min(self.left, self._config.micro_batch_tokens - self._loads[0])

    def cold_room(self, num_pages: int) -> int:
        """Tokens that the next slice with cold pages may have, of so many pages in all."""
        return min(self.left, self._cold.room(num_pages))

    def add(self, piece: Slice) -> None:
        size = len(piece.tokens)
        if piece.cold:
            assert 0 < size <= self.cold_room(piece.num_pages), (size, piece.num_pages)
            self._cold.add(piece)
        else:
            assert 0 < size <= self.room, (size, self.room)
            heapreplace(self._loads, self._loads[0] + size)
            self._warm.append(piece)
        self._tokens += size

    def pack(self) -> tuple[MicroBatch, ...]:
        """Those on the device first: their layers run while the first cold pages are brought."""
        cold = self._cold.packed()
        if not self._warm:
            return cold
        config = self._config
        tokens, least = config.micro_batch_tokens, config.least_part
        return pack(self._warm, config.micro_batches, tokens, least) + cold


class ColdBatches:
    """Micro-batches of slices with cold pages, each with a bound on tokens and on pages.

    Each slice goes where there are fewest pages.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._batches: list[list[Slice]] = [[] for _ in range(config.cold_micro_batches)]
        # A heap of pages, tokens, and which of the batches.
        self._loads = [(0, 0, i) for i in range(config.cold_micro_batches)]
        self.num_slices = 0

    def room(self, num_pages: int) -> int:
        """Tokens that a slice of so many pages may have; 0 when none of the micro-batches has room."""
        if not self._loads:
            return 0
        pages, tokens, _ = self._loads[0]
        if pages + num_pages > self._config.kv_ring_pages:
            return 0
        return self._config.micro_batch_tokens - tokens

    def add(self, piece: Slice) -> None:
        self._batches[self.reserve(piece.num_pages, len(piece.tokens))].append(piece)
        self.num_slices += 1

    def reserve(self, num_pages: int, num_tokens: int) -> int:
        """Take room; in which of the micro-batches."""
        pages, tokens, index = self._loads[0]
        heapreplace(self._loads, (pages + num_pages, tokens + num_tokens, index))
        return index

    def packed(self) -> tuple[MicroBatch, ...]:
        return tuple(MicroBatch(tuple(pieces)) for pieces in self._batches if pieces)
