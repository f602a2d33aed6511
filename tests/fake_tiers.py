"""Stages that keep pages in three tiers as plain Python, and carry moves out when they please."""

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from headrace.scheduler.plan import MoveKind, PageMove, PassResult, StageTimes

Content = tuple[object, ...]
"""What a page holds: the tenant, then every token from the sequence's first to the page's last."""

GARBAGE: Content = ("garbage",)
WRITES_PAGE = (MoveKind.IN,)
WRITES_SLOT = (MoveKind.OUT, MoveKind.FETCH)
DAMAGED: Content = ("damaged",)


@dataclass
class FakeStage:
    """One stage's copies. A move reads and writes when it ends, and spoils its target until then."""

    device: dict[int, Content] = field(default_factory=dict)
    host: dict[int, Content] = field(default_factory=dict)
    log: dict[bytes, Content] = field(default_factory=dict)
    window: dict[int, Content] = field(default_factory=dict)
    under_way: dict[int, PageMove] = field(default_factory=dict)

    def start(self, move: PageMove) -> None:
        assert move.number not in self.under_way
        self.under_way[move.number] = move
        if move.kind is MoveKind.IN:
            self.device[move.page] = GARBAGE
        elif move.kind is MoveKind.SINK:
            self.window[move.nvme_slot] = GARBAGE
        elif move.kind is not MoveKind.SPILL:
            self.host[move.slot] = GARBAGE

    def end(self, number: int, *, lose: bool) -> bool:
        """Whether the page has come to where it was to go."""
        move = self.under_way.pop(number)
        if lose or (move.kind is MoveKind.FETCH and move.key not in self.log):
            self.log.pop(move.key, None) if move.kind is MoveKind.FETCH else None
            return False
        if move.kind is MoveKind.OUT:
            self.host[move.slot] = self.device[move.page]
        elif move.kind is MoveKind.IN:
            self.device[move.page] = self.host[move.slot]
        elif move.kind is MoveKind.SPILL:
            self.log[move.key] = self.host[move.slot]
        elif move.kind is MoveKind.SINK:
            self.window[move.nvme_slot] = self.host[move.slot]
        else:
            self.host[move.slot] = self.log[move.key]
        return True


class FakeTiers:
    """Several stages, each of which ends moves in an order of its own and loses some of them.

    `contents` says what each key stands for, so that nothing is ever saved that is something else.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        stages: int = 2,
        loss: float = 0.0,
        lossy: Collection[MoveKind] = tuple(MoveKind),
    ) -> None:
        self.stages = [FakeStage() for _ in range(stages)]
        self.contents: dict[bytes, Content] = {}
        self.num_lost = 0
        self._rng, self._loss, self._lossy = rng, loss, lossy

    @property
    def under_way(self) -> list[PageMove]:
        """Moves that some stage has not ended, and those that all have: nobody knows of these yet."""
        found = {move.number: move for stage in self.stages for move in stage.under_way.values()}
        return list(found.values())

    def start(self, moves: Iterable[PageMove]) -> None:
        for move in moves:
            for other in self.under_way:
                self._check_pair(move, other)
            for stage in self.stages:
                stage.start(move)

    def write(self, page: int, content: Content) -> None:
        """What a pass computes, on all stages."""
        assert all(move.page != page for move in self.under_way), "a page written under a move"
        for stage in self.stages:
            stage.device[page] = content

    def read(self, page: int) -> Content:
        """What a pass finds, on all stages alike."""
        found = {stage.device[page] for stage in self.stages}
        assert len(found) == 1, f"page {page} differs between stages"
        content = found.pop()
        assert content is not GARBAGE, f"page {page} was read before it had come"
        return content

    def read_slot(self, slot: int) -> Content:
        """What a pass finds in host RAM, on all stages alike."""
        found = {stage.host[slot] for stage in self.stages}
        assert len(found) == 1, f"slot {slot} differs between stages"
        content = found.pop()
        assert content is not GARBAGE, f"slot {slot} was read before it had come"
        return content

    def read_window(self, place: int) -> Content | None:
        """What a pass finds on NVMe, on all stages alike; None where one of them finds it damaged."""
        found = {stage.window[place] for stage in self.stages}
        assert GARBAGE not in found, f"NVMe slot {place} was read before it had come"
        if DAMAGED in found:
            return None
        assert len(found) == 1, f"NVMe slot {place} differs between stages"
        return found.pop()

    def damage(self, chance: float) -> None:
        """Pages on NVMe go bad, on some stage."""
        for stage in self.stages:
            for place, content in stage.window.items():
                if content is not GARBAGE and self._rng.random() < chance:
                    stage.window[place] = DAMAGED

    def report(self, step: int, *, everything: bool) -> list[PassResult]:
        """One result a stage, with some of the moves under way, or with all of them."""
        results = []
        for number, stage in enumerate(self.stages):
            moved, lost = [], []
            for move in self._shuffled(stage.under_way.values()):
                if everything or self._rng.random() < 0.4:
                    lose = move.kind in self._lossy and self._rng.random() < self._loss
                    ended = stage.end(move.number, lose=lose)
                    (moved if ended else lost).append(move.number)
                    self._check_saved(stage, move)
            self.num_lost += len(lost)
            times = StageTimes(number, 0.0, 0.0, 0.0, 0, 0)
            results.append(PassResult(step, (), times, tuple(moved), tuple(lost)))
        return results

    def abandon(self) -> None:
        """End some moves on some stages, and none of the others; nobody hears of it."""
        for stage in self.stages:
            for move in self._shuffled(stage.under_way.values()):
                if self._rng.random() < 0.5:
                    stage.end(move.number, lose=False)
            stage.under_way.clear()

    def drop_from_logs(self, chance: float) -> None:
        """Forget pages on NVMe, as a stage may whose log is full or damaged."""
        for stage in self.stages:
            for key in [key for key in stage.log if self._rng.random() < chance]:
                del stage.log[key]

    def _shuffled(self, moves: Iterable[PageMove]) -> Sequence[PageMove]:
        return self._rng.sample(found := list(moves), len(found))

    def _check_saved(self, stage: FakeStage, move: PageMove) -> None:
        if move.kind is MoveKind.SPILL and move.key in stage.log:
            assert stage.log[move.key] == self.contents[move.key], "another page was saved"

    @staticmethod
    def _check_pair(move: PageMove, other: PageMove) -> None:
        """Two moves under way share nothing that either of them writes."""
        if move.page == other.page and move.page >= 0:
            assert not {move.kind, other.kind} & set(WRITES_PAGE)
        if move.nvme_slot >= 0:
            assert move.nvme_slot != other.nvme_slot, (move, other)
        if move.slot == other.slot:
            assert not {move.kind, other.kind} & set(WRITES_SLOT), (move, other)
