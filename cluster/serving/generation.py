"""The sequences of one HTTP request while they are generated."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.cluster.completion import Completion
from headrace.cluster.serving.terms import Terms
from headrace.scheduler.plan import Sample
from headrace.scheduler.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Order:
    """One sequence to be generated, as Engine.add takes it. `params.n` is 1."""

    token_ids: list[int]
    params: SamplingParams
    seed: int
    tenant: str = ""
    keep: bool = False
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What came of sequence `index` since it was last read; `completion` when it has ended."""

    index: int
    samples: list[Sample]
    completion: Completion | None


@dataclass(slots=True)
class _Sequence:
    samples: list[Sample] = field(default_factory=list)
    completion: Completion | None = None
    has_begun: bool = False
    is_read: bool = False


class Generation:
    """Takes in tokens as the engine commits them, and keeps them until one task reads them.

    Both sides are on the event loop. Whoever feeds never waits for the reader: what is kept is at most
    every sequence's `max_tokens`. One `of_batch` is fed when a sequence has ended, and with its
    completion alone. From `begin_by` on, on the engine loop's clock, it waits for no others to share its first pass.
    """

    def __init__(
        self,
        orders: Sequence[Order],
        terms: Terms | None = None,
        *,
        of_batch: bool = False,
        begin_by: float = math.inf,
    ) -> None:
        self.orders, self.terms, self.of_batch = list(orders), terms or Terms(), of_batch
        self.begin_by = begin_by
        self._sequences = [_Sequence() for _ in orders]
        self._error: Exception | None = None
        self._news = asyncio.Event()

    @property
    def num_waiting(self) -> int:
        """Sequences without a token yet."""
        return sum(not sequence.has_begun for sequence in self._sequences)

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    @property
    def has_ended(self) -> bool:
        """Whether the engine has nothing more for it."""
        return self._error is not None or all(each.completion for each in self._sequences)

    def feed(self, index: int, samples: Sequence[Sample], completion: Completion | None) -> None:
        sequence = self._sequences[index]
        sequence.samples += samples
        sequence.completion = completion
        sequence.has_begun = True
        self._news.set()

    def fail(self, error: Exception) -> None:
        """Let the reader have an error in place of what would have come; the first one counts."""
        if not self.has_ended:
            self._error = error
            self._news.set()

    async def read(self) -> list[Progress]:
        """Wait for news of any sequence. Empty when all have ended and been read."""
        while True:
            if self._error is not None:
                raise self._error
            news = [self._take(i) for i, each in enumerate(self._sequences) if _has_news(each)]
            if news or all(each.is_read for each in self._sequences):
                return news
            self._news.clear()
            await self._news.wait()

    def _take(self, index: int) -> Progress:
        sequence = self._sequences[index]
        samples, sequence.samples = sequence.samples, []
        sequence.is_read = sequence.completion is not None
        return Progress(index, samples, sequence.completion)


def _has_news(sequence: _Sequence) -> bool:
    return bool(sequence.samples) or (sequence.completion is not None and not sequence.is_read)
