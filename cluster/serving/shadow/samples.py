"""Which answers are compared, and those that wait for it: token ids in memory, up to a number of tokens."""

import hashlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from headrace.scheduler.plan import PAGE_TOKENS

DROPPED = ("full", "long", "failed")
"""Why a sample is not compared: too many wait, it is longer than the sweeps have memory for, or the process failed
with it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """`tokens` of the prompt and of the answer; `taken` on the queue's clock."""

    tokens: "array[int]"
    prompt: int
    greedy: bool
    taken: float


class Lottery:
    """Draws requests by their number and a secret: what was asked, and by whom, has no part in it."""

    def __init__(self, share: float, secret: bytes) -> None:
        self._below, self._secret = round(share * 2**64), secret

    def draws(self, request_id: int) -> bool:
        number = request_id.to_bytes(8, "big")
        drawn = hashlib.blake2b(number, digest_size=8, key=self._secret).digest()
        return int.from_bytes(drawn, "big") < self._below


def padded_length(longest: int, limit: int) -> int:
    """What sequences are padded to: whole KV pages, which bounds the pages of a micro-batch."""
    return min(-(-longest // PAGE_TOKENS) * PAGE_TOKENS, limit)


class SampleQueue:
    """Oldest first. `most` tokens at once, those of batches that are under way counted; none of a sequence of more than
    `longest`."""

    def __init__(self, most: int, longest: int, clock: Callable[[], float] = monotonic) -> None:
        self._most, self._longest, self._clock = most, longest, clock
        self._waiting: deque[Sample] = deque()
        self.tokens = 0
        self.dropped: Counter[str] = Counter()

    @property
    def oldest(self) -> float | None:
        """When the first of those that wait came."""
        return self._waiting[0].taken if self._waiting else None

    def offer(self, prompt: Sequence[int], answer: Sequence[int], *, greedy: bool) -> None:
        if not answer:
            return
        size = len(prompt) + len(answer)
        if size > self._longest:
            self.dropped["long"] += 1
        elif self.tokens + size > self._most:
            self.dropped["full"] += 1
        else:
            tokens = array("i", prompt)
            tokens.extend(answer)
            self._waiting.append(Sample(tokens, len(prompt), greedy, self._clock()))
            self.tokens += size

    def take(self, padded: int) -> list[Sample]:
        """A batch of at most so many tokens when all are as long as the longest. `release` has to follow."""
        batch: list[Sample] = []
        longest = 0
        while self._waiting:
            longest = max(longest, padded_length(len(self._waiting[0].tokens), self._longest))
            if batch and (len(batch) + 1) * longest > padded:
                break
            batch.append(self._waiting.popleft())
        return batch

    def release(self, batch: Sequence[Sample], dropped: str | None = None) -> None:
        """A batch is done with, or given up for that reason."""
        self.tokens -= sum(len(sample.tokens) for sample in batch)
        if dropped is not None:
            self.dropped[dropped] += len(batch)
