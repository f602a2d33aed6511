"""Which experts nearly every pass reaches: told from what the last passes reached, not foreseen."""

from collections.abc import Sequence

from headrace.scheduler.experts import LIKELY, RECENT


class ReachHistory:
    """One layer's experts, with a bit for each of the recent passes. Costs nothing for experts that
    are not reached."""

    def __init__(self) -> None:
        self._last = 0  # the number of the last pass that came to the layer
        # By expert: the last pass that reached it, and the bits of that pass (lowest) and those before.
        self._reached: dict[int, tuple[int, int]] = {}
        self._often: set[int] = set()

    def reach(self, number: int, experts: Sequence[int]) -> list[int]:
        """Note that pass `number`, counted from 1, reaches some experts. The result has those that
        it had not reached before, with an earlier micro-batch."""
        self._last = number
        new = []
        for expert in experts:
            last, bits = self._reached.get(expert, (0, 0))
            if last < number:
                new.append(expert)
                self._reached[expert] = number, _later(bits, number - last) | 1
                if self._is_likely(expert):
                    self._often.add(expert)
        return new

    def likely(self) -> list[int]:
        """The experts that the layer's next pass reaches if it is like the last ones, ascending."""
        self._often = {expert for expert in self._often if self._is_likely(expert)}
        return sorted(self._often)

    def _is_likely(self, expert: int) -> bool:
        last, bits = self._reached[expert]
        return _later(bits, self._last - last).bit_count() >= LIKELY


def _later(bits: int, passes: int) -> int:
    """The bits after so many more passes, none of which reached the expert."""
    return bits << min(passes, RECENT) & (1 << RECENT) - 1
