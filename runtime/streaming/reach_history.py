"""Which experts nearly every pass reaches: told from what the last passes reached, not foreseen."""

from collections import Counter, deque
from collections.abc import Sequence

from headrace.scheduler.experts import LIKELY, RECENT


class ReachHistory:
    """What each of the recent passes that came to one layer reached of its experts."""

    def __init__(self) -> None:
        self._number = 0
        self._recent: deque[set[int]] = deque()  # the last one is that of pass `_number`
        self._counts: Counter[int] = Counter()  # of each expert in `_recent`
        self._likely: list[int] | None = None

    def reach(self, number: int, experts: Sequence[int]) -> list[int]:
        """Note that pass `number`, counted from 1, reaches some experts. The result has those that
        it had not reached before, with an earlier micro-batch."""
        if number != self._number:
            self._number = number
            if len(self._recent) == RECENT:
                self._counts.subtract(self._recent.popleft())
            self._recent.append(set())
        new = [expert for expert in experts if expert not in self._recent[-1]]
        self._recent[-1].update(new)
        self._counts.update(new)
        self._likely = None
        return new

    def likely(self) -> list[int]:
        """The experts that the layer's next pass reaches if it is like the last ones, ascending."""
        if self._likely is None:
            self._likely = sorted(e for e, count in self._counts.items() if count >= LIKELY)
        return self._likely
