"""Which of many equal things are in few slots: chosen by how often they are used, not how lately.

A scan over more things than there are slots hits nothing under LRU, and a fixed set hits its share.
So most slots are *kept* by the most used entries, and a newcomer displaces the least used of them
only when it has been used clearly more often (the admission rule of TinyLFU, arXiv 1512.00727, with
exact counts). What is not worth keeping passes through *transit* slots, least recently used first
out. Where a newcomer is worth more than a kept entry, the two slots swap roles; no bytes move.
"""

import heapq
from collections import Counter, OrderedDict, deque
from typing import Generic, TypeVar

Key = TypeVar("Key")

MARGIN = 2
"""Uses by which a newcomer must lead. A scan uses everything alike, so that no lead exceeds one."""

MEAN_USES = 8
"""All counts are halved when the mean one has grown by so much: long enough to tell uses apart."""


class SlotCache(Generic[Key]):
    """The policy alone: keys, slot numbers and counts. `keys` is how many different ones there are.

    An entry is pinned while its slot is written or read, and is then no victim. Not thread-safe.
    """

    def __init__(self, *, slots: int, transit: int, keys: int) -> None:
        assert transit >= 0
        self._transit_slots = transit
        self._size = 0
        self._free: deque[int] = deque()
        self._slots: dict[Key, int] = {}
        self._pins: Counter[Key] = Counter()
        self._transit: OrderedDict[Key, None] = OrderedDict()
        # The serial number of a kept entry's place in the heap, which finds the least used one.
        self._kept: dict[Key, int] = {}
        self._heap: list[tuple[int, int, Key]] = []
        self._serial = 0
        self._uses: Counter[Key] = Counter()
        self._until_halved = self._window = MEAN_USES * max(keys, 1)
        for _ in range(slots):
            self.add_slot()

    def __contains__(self, key: Key) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, key: Key) -> int:
        return self._slots[key]

    def is_kept(self, key: Key) -> bool:
        return key in self._kept

    def is_pinned(self, key: Key) -> bool:
        return key in self._pins

    def add_slot(self) -> int:
        """One more slot to keep something in; its number."""
        self._free.append(self._size)
        self._size += 1
        return self._size - 1

    def pin(self, key: Key) -> None:
        assert key in self._slots
        self._pins[key] += 1

    def unpin(self, key: Key) -> None:
        self._pins[key] -= 1
        assert self._pins[key] >= 0, key
        if not self._pins[key]:
            del self._pins[key]

    def use(self, key: Key) -> None:
        """Count a use of `key`, whether it is in a slot or not."""
        self._uses[key] += 1
        self._until_halved -= 1
        if not self._until_halved:
            self._halve()
        if key in self._transit:
            self._transit.move_to_end(key)
            self._promote(key)

    def take(self, key: Key) -> int | None:
        """Give `key` a slot and pin it; what was in the slot is out. None when it gets none now."""
        assert key not in self._slots
        slot = self._slot_for(key)
        if slot is None:
            return None
        self._slots[key] = slot
        self._pins[key] += 1
        if len(self._kept) < self._size - self._transit_slots:
            self._keep(key)
        else:
            self._transit[key] = None
            self._promote(key)
        return slot

    def drop(self, key: Key) -> None:
        """Free the slot of an entry whose bytes are not there after all."""
        assert key not in self._pins
        self._free.append(self._remove(key))

    def _slot_for(self, key: Key) -> int | None:
        if self._free:
            return self._free.popleft()
        victim = next((k for k in self._transit if k not in self._pins), None)
        if victim is None:
            victim = self._displaced_by(key)
            if victim is None:
                return None
        return self._remove(victim)

    def _remove(self, key: Key) -> int:
        self._kept.pop(key, None)
        self._transit.pop(key, None)
        return self._slots.pop(key)

    def _keep(self, key: Key) -> None:
        self._serial += 1
        self._kept[key] = self._serial
        heapq.heappush(self._heap, (self._uses[key], self._serial, key))

    def _promote(self, key: Key) -> None:
        """Have a transit entry and a kept one swap roles, if that one is used clearly less."""
        other = self._displaced_by(key)
        if other is not None:
            del self._transit[key], self._kept[other]
            self._keep(key)
            self._transit[other] = None
            self._transit.move_to_end(other, last=False)

    def _displaced_by(self, key: Key) -> Key | None:
        """The kept entry that `key` is worth more than. None while that one is pinned: else all
        transit slots could come to be."""
        least = self._least_used()
        if least is None or least in self._pins:
            return None
        return least if self._uses[key] >= self._uses[least] + MARGIN else None

    def _least_used(self) -> Key | None:
        """The kept entry with the fewest uses, the one kept longest if there are several.

        Counts in the heap are those of when an entry was last looked at, which only grow.
        """
        while self._heap:
            uses, serial, key = self._heap[0]
            if self._kept.get(key) != serial:
                heapq.heappop(self._heap)
            elif uses != self._uses[key]:
                heapq.heapreplace(self._heap, (self._uses[key], serial, key))
            else:
                return key
        return None

    def _halve(self) -> None:
        self._until_halved = self._window
        self._uses = Counter({key: n // 2 for key, n in self._uses.items() if n > 1})
        self._heap = [(self._uses[key], serial, key) for key, serial in self._kept.items()]
        heapq.heapify(self._heap)
