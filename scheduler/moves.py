"""Moves of pages under way, and what all stages together have to say of them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from headrace.scheduler.plan import NO_PAGE, MoveKind, PageMove, PassResult


class Moves:
    """Moves from the decision to the report that ends them; each is carried by one pass."""

    def __init__(self) -> None:
        self.num_moved = dict.fromkeys(MoveKind, 0)
        self.num_lost = dict.fromkeys(MoveKind, 0)
        self._number = 0
        self._under_way: dict[int, PageMove] = {}
        self._untaken: list[PageMove] = []

    def __len__(self) -> int:
        return len(self._under_way)

    def __iter__(self) -> Iterator[PageMove]:
        return iter(self._under_way.values())

    def start(
        self,
        kind: MoveKind,
        slot: int,
        page: int,
        key: bytes,
        cohort: int,
        nvme_slot: int = NO_PAGE,
    ) -> None:
        move = PageMove(self.next_number(), kind, slot, page, key, cohort, nvme_slot)
        self._under_way[move.number] = move
        self._untaken.append(move)

    def next_number(self) -> int:
        """Of a move, or of something else that is reported like one."""
        self._number += 1
        return self._number

    def take(self) -> tuple[PageMove, ...]:
        """What the next pass carries."""
        taken, self._untaken = tuple(self._untaken), []
        return taken

    def abandon(self) -> list[PageMove]:
        """All that are under way, which will not be reported; none is any more."""
        abandoned = [*self._under_way.values()]
        self._under_way.clear()
        self._untaken = []
        return abandoned

    def end(self, number: int, *, lost: bool) -> PageMove:
        move = self._under_way.pop(number)
        (self.num_lost if lost else self.num_moved)[move.kind] += 1
        return move


class MoveReports:
    """Merges what stages report: a move has ended when all have, and is lost if any lost it."""

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages
        self._reports: Counter[int] = Counter()
        self._lost: set[int] = set()

    def merge(self, results: Iterable[PassResult]) -> tuple[Sequence[int], Sequence[int]]:
        """The numbers of moves that these results end: those done and those lost, each in order."""
        ended: list[int] = []
        for result in results:
            self._lost.update(result.lost)
            for number in (*result.moved, *result.lost):
                self._reports[number] += 1
                assert self._reports[number] <= self._num_stages, f"move {number} ended twice"
                if self._reports[number] == self._num_stages:
                    ended.append(number)
        ended.sort()
        lost = [number for number in ended if number in self._lost]
        moved = [number for number in ended if number not in self._lost]
        for number in ended:
            del self._reports[number]
        self._lost.difference_update(lost)
        return moved, lost
