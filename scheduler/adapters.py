"""Which adapters lie in the devices' slots, which come to them, and who holds them there."""

from collections import Counter, OrderedDict
from collections.abc import Sequence

from headrace.scheduler.moves import Moves
from headrace.scheduler.plan import Adapter, AdapterLoad


class AdapterSlots:
    """`count` slots with the same numbers on every stage.

    An adapter that some request holds stays in its slot; of the others the one that was let go of longest ago
    makes room. A slot to which one is on its way is not taken for another until every stage has said that it
    has come, or failed to. What earlier passes read of a slot they have read when the pass that brings the next
    load begins, for stages run passes one after the other.

    Loads have numbers of their own among the `moves` of pages, with which they are reported.
    """

    def __init__(self, count: int, moves: Moves) -> None:
        self._free = list(reversed(range(count)))
        self._moves = moves
        self._slots: OrderedDict[Adapter, int] = OrderedDict()  # least recently let go of first
        self._holders: Counter[Adapter] = Counter()
        self._under_way: dict[int, Adapter] = {}
        self._untaken: list[AdapterLoad] = []

    @property
    def is_loading(self) -> bool:
        """Whether loads are under way, or wait for a pass to carry them."""
        return bool(self._under_way)

    def can_hold(self, adapter: Adapter) -> bool:
        """Whether it is in a slot, or one can be had for it."""
        return adapter in self._slots or bool(self._free) or self._victim() is not None

    def hold(self, adapter: Adapter) -> int:
        """Keep it in a slot for one request more, and have it brought there if need be. Returns the slot."""
        self._holders[adapter] += 1
        if adapter not in self._slots:
            if not self._free:
                self._evict()
            self._slots[adapter] = self._free.pop()
            self._begin(adapter)
        return self._slots[adapter]

    def let_go(self, adapter: Adapter) -> None:
        """One request holds it no more."""
        self._holders[adapter] -= 1
        if not self._holders[adapter]:
            del self._holders[adapter]
            if adapter in self._slots:
                self._slots.move_to_end(adapter)

    def has_come(self, adapter: Adapter) -> bool:
        return adapter in self._slots and adapter not in self._under_way.values()

    def take(self) -> tuple[AdapterLoad, ...]:
        """What the next pass carries."""
        taken, self._untaken = tuple(self._untaken), []
        return taken

    def settle(
        self, moved: Sequence[int], lost: Sequence[int]
    ) -> tuple[list[int], list[int], dict[Adapter, int]]:
        """Take the loads out of what has ended on all stages. Returns the moves that are left, and the adapters
        that have not come, with the numbers of their loads."""
        failed = {}
        for number in lost:
            if (adapter := self._under_way.pop(number, None)) is not None:
                self._free.append(self._slots.pop(adapter))
                failed[adapter] = number
        left = [n for n in moved if self._under_way.pop(n, None) is None]
        return left, [n for n in lost if n not in failed.values()], failed

    def abandon(self) -> None:
        """Loads under way will not be reported: what is held is brought once more."""
        self._bring({*self._under_way.values()})

    def lose(self) -> None:
        """Some stage has lost what is in the slots: what is held is brought once more."""
        self._bring({*self._slots})

    def _bring(self, lost: set[Adapter]) -> None:
        self._under_way = {n: a for n, a in self._under_way.items() if a not in lost}
        self._untaken = [load for load in self._untaken if load.adapter not in lost]
        for adapter in [adapter for adapter in self._slots if adapter in lost]:
            if adapter in self._holders:
                self._begin(adapter)
            else:
                self._free.append(self._slots.pop(adapter))

    def _begin(self, adapter: Adapter) -> None:
        load = AdapterLoad(self._moves.next_number(), self._slots[adapter], adapter)
        self._under_way[load.number] = adapter
        self._untaken.append(load)

    def _evict(self) -> None:
        victim = self._victim()
        assert victim is not None, "no slot can be had"
        self._free.append(self._slots.pop(victim))

    def _victim(self) -> Adapter | None:
        coming = {*self._under_way.values()}
        unheld = (a for a in self._slots if a not in self._holders and a not in coming)
        return next(unheld, None)

    def check_integrity(self) -> None:
        """Assert that every slot is free or one adapter's."""
        assert len({*self._free, *self._slots.values()}) == len(self._free) + len(self._slots)
        assert {*self._under_way.values()} <= self._slots.keys()
        assert self._holders.keys() <= self._slots.keys()
