"""Which adapters lie in the devices' slots, which come to them, and who holds them there."""

from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from headrace.scheduler.moves import Moves
from headrace.scheduler.plan import Adapter, AdapterLoad
from headrace.scheduler.request import Request
from headrace.scheduler.shares import line_of


class SlotQueue:
    """Requests that wait for slots for their adapters: the first of each owner and adapter, and those that gave way.

    Those behind them pass them if they can run: without an adapter, or with one that is in a slot. That nobody keeps
    the slots for ever, whoever first had to wait longest ago is `due` once `most` others have begun since, even if it
    ran meanwhile and gave way. From then on nobody with an adapter begins before it, so that those that hold slots end
    and one is left. One with an adapter never passes one of a lower rank.
    """

    def __init__(self, most: int) -> None:
        self._most, self._begun = most, 0
        self._since: dict[Request, int] = {}  # how many had begun when it first had to wait
        self._waiting: set[Request] = set()

    @property
    def due(self) -> Request | None:
        if not self._waiting:
            return None
        first = min(self._waiting, key=lambda r: (self._since[r], r.request_id))
        return first if self._begun - self._since[first] >= self._most else None

    def lets(self, request: Request) -> bool:
        """Whether a request with an adapter may begin if there is a slot for it."""
        if (due := self.due) is not None:
            # One that had given its pages up may be in front of it.
            return (line_of(request), request.adapter) == (line_of(due), due.adapter)
        return all(each.rank >= request.rank for each in self._waiting)

    def wait(self, request: Request) -> None:
        """It cannot begin now."""
        self._since.setdefault(request, self._begun)
        self._waiting.add(request)

    def begin(self, request: Request) -> None:
        """It runs."""
        self._begun += 1
        self._waiting.discard(request)

    def end(self, request: Request) -> None:
        """It will not wait again."""
        self._waiting.discard(request)
        self._since.pop(request, None)


@dataclass(frozen=True, slots=True)
class AdapterStats:
    """Slots now, by state, and totals since the scheduler was made.

    Slots are `free`, `used` by requests that run, `coming` (loads are under way) or `cached`: with an adapter that
    nobody uses now. `waiting` adapters are asked for, and no slot can be had. Requests that began found their adapter on the
    device (`hits`) or had to wait for it (`misses`). `loads` have come, `failed` have not, and `evictions` are of
    adapters that made room.
    """

    free: int = 0
    used: int = 0
    cached: int = 0
    coming: int = 0
    waiting: int = 0
    hits: int = 0
    misses: int = 0
    loads: int = 0
    failed: int = 0
    evictions: int = 0


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
        self._hits = self._misses = self._loads = self._failed = self._evictions = 0

    @property
    def is_loading(self) -> bool:
        """Whether loads are under way, or wait for a pass to carry them."""
        return bool(self._under_way)

    def can_hold(self, adapter: Adapter) -> bool:
        """Whether it is in a slot, or one can be had for it."""
        return adapter in self._slots or bool(self._free) or self._victim() is not None

    @property
    def is_emptying(self) -> bool:
        """Whether nobody holds some slot: one can be had when what is on its way there has come."""
        return len(self._slots) > len(self._holders)

    def hold(self, adapter: Adapter) -> int:
        """Keep it in a slot for one request more, and have it brought there if need be. Returns the slot."""
        self._holders[adapter] += 1
        if self.has_come(adapter):
            self._hits += 1
        else:
            self._misses += 1
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
        self._failed += len(failed)
        self._loads += len(moved) - len(left)
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
        self._evictions += 1

    def _victim(self) -> Adapter | None:
        coming = {*self._under_way.values()}
        unheld = (a for a in self._slots if a not in self._holders and a not in coming)
        return next(unheld, None)

    def stats(self, wanted: Collection[Adapter]) -> AdapterStats:
        """`wanted` are the adapters that requests wait with."""
        coming = {*self._under_way.values()}
        used = len(self._holders.keys() - coming)
        return AdapterStats(
            free=len(self._free),
            used=used,
            cached=len(self._slots) - used - len(coming),
            coming=len(coming),
            waiting=sum(not self.can_hold(adapter) for adapter in wanted),
            hits=self._hits,
            misses=self._misses,
            loads=self._loads,
            failed=self._failed,
            evictions=self._evictions,
        )

    def check_integrity(self) -> None:
        """Assert that every slot is free or one adapter's."""
        assert len({*self._free, *self._slots.values()}) == len(self._free) + len(self._slots)
        assert {*self._under_way.values()} <= self._slots.keys()
        assert self._holders.keys() <= self._slots.keys()
