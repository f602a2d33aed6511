"""Experts on their way to the device: from a cache in host RAM, from the drive through it, or past it.

The cache fills from two sides: a background thread pins memory and reads evenly spread experts into
it, and what is used clearly more often displaces what is used least when it is read anyway.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch

from headrace.runtime.memory.held import Holding, named
from headrace.runtime.streaming.copies import Copy, HostCopies
from headrace.runtime.streaming.loads import Load, Storage
from headrace.runtime.streaming.slot_cache import SlotCache
from headrace.runtime.streaming.tiers import AlignedBuffer
from headrace.runtime.trace import NULL_TRACER, Tracer
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.placement import Tier

ExpertKey = tuple[int, int]
"""(layer, expert)."""

STEP_BYTES = 64 << 20
"""The background pins and reads so much at a time: what is asked for waits behind no more."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one expert's bytes are: `nbytes` from `offset` on, both multiples of 4096."""

    file: Path
    offset: int
    nbytes: int


class HostMemory:
    """Slots in host RAM, added some at a time."""

    def __init__(self, slot_bytes: int, *, pinned: bool) -> None:
        self.slot_bytes = slot_bytes
        self._pinned = pinned
        self._buffers: list[AlignedBuffer] = []
        self._slots: list[torch.Tensor] = []

    def add(self, count: int) -> None:
        """Raises DoesNotFitError."""
        buffer = AlignedBuffer(count * self.slot_bytes, pinned=self._pinned)
        self._buffers.append(buffer)
        self._slots.extend(buffer.tensor.view(count, self.slot_bytes).unbind())

    def memory(self) -> Iterator[Holding]:
        return named("host_experts", [buffer.tensor for buffer in self._buffers])

    def slot(self, index: int, nbytes: int) -> torch.Tensor:
        return self._slots[index][:nbytes]

    def close(self) -> None:
        self._slots.clear()
        while self._buffers:
            self._buffers.pop().close()


class HostExperts:
    """Loads experts, and keeps up to `slots` of them in host RAM; `first` are read in advance.

    Only one thread calls it. The storage stays the caller's. When memory cannot be had, the next
    load raises; when an expert cannot be read, the load that asks for it does.
    """

    def __init__(
        self,
        places: Mapping[ExpertKey, Place],
        first: Sequence[ExpertKey],
        *,
        slots: int,
        slot_bytes: int,
        storage: Storage,
        device: torch.device,
        tracer: Tracer = NULL_TRACER,
    ) -> None:
        self._places = places
        self._storage = storage
        self._copies = HostCopies(device, "experts", tracer)
        self._memory = HostMemory(slot_bytes, pinned=self._copies.pinned)
        self._lock = threading.Lock()
        # Guarded by the lock. An entry is pinned while its slot is read into or copied from.
        self._cache: SlotCache[ExpertKey] = SlotCache(slots=0, transit=0, keys=len(places))
        self._reads: dict[int, Load] = {}
        self._filled: set[int] = set()
        self._copying: list[tuple[ExpertKey, Copy]] = []
        self._unread: deque[ExpertKey] = deque()
        # The background's.
        self._first = deque(first)
        self._filling: deque[tuple[ExpertKey, Load]] = deque()
        self._error: Exception | None = None
        self._closing, self._idle = threading.Event(), threading.Event()
        self._idle.set()
        self._filler = threading.Thread(
            target=self._fill, args=(slots,), name="headrace-fill-experts", daemon=True
        )
        self._filler.start()

    def memory(self) -> Iterator[Holding]:
        """What is held in host RAM."""
        return self._memory.memory()

    def load(self, key: ExpertKey, dest: torch.Tensor) -> tuple[Load, Tier]:
        """Start filling `dest`, on CUDA behind the current stream's work, and say from where.

        Raises DoesNotFitError when the host's memory could not be had.
        """
        if self._error is not None:
            raise self._error
        place = self._places[key]
        assert dest.nbytes == place.nbytes
        with self._lock:
            self._let_go()
            self._cache.use(key)
            slot = self._pinned_slot(key)
            if slot is None:
                return self._storage.load(place.file, place.offset, dest), Tier.NVME
            here, coming = slot in self._filled, slot in self._reads
            read = None if here else self._read(key)
            memory = self._memory.slot(slot, place.nbytes)
            copy = self._copies.copy(partial(self._arrived, slot, read, memory), dest, here=here)
            self._copying.append((key, copy))
        return copy, Tier.HOST if here or coming else Tier.NVME

    def _pinned_slot(self, key: ExpertKey) -> int | None:
        """The slot that holds or shall hold an expert; None when it is not worth one."""
        if key in self._cache:
            self._cache.pin(key)
            return self._cache.slot(key)
        slot = self._cache.take(key)
        if slot is not None:
            self._filled.discard(slot)
        return slot

    def _read(self, key: ExpertKey) -> Load:
        """Read an expert into its slot, if that is not under way."""
        slot, place = self._cache.slot(key), self._places[key]
        if slot not in self._reads:
            memory = self._memory.slot(slot, place.nbytes)
            self._reads[slot] = self._storage.load(place.file, place.offset, memory)
        return self._reads[slot]

    def _arrived(self, slot: int, read: Load | None, memory: torch.Tensor) -> torch.Tensor:
        """The slot's memory when what is read into it is there. May be called for a read again."""
        if read is None:
            return memory
        try:
            read.wait()
            with self._lock:
                self._filled.add(slot)
        finally:
            with self._lock:
                if self._reads.get(slot) is read:
                    del self._reads[slot]
        return memory

    def _let_go(self) -> None:
        """Unpin what has been copied."""
        copying, self._copying = self._copying, []
        for key, copy in copying:
            if copy.is_over:
                self._cache.unpin(key)
            else:
                self._copying.append((key, copy))

    def pause(self) -> None:
        """Keep the background from reading: something is waited for."""
        self._idle.clear()

    def resume(self) -> None:
        self._idle.set()

    def wait(self) -> None:
        """Return when the background is done. Raises DoesNotFitError."""
        self._idle.set()
        self._filler.join()
        if self._error is not None:
            raise self._error

    def _fill(self, slots: int) -> None:
        """Pin memory while experts are read into what is there, then read the others."""
        step = max(1, STEP_BYTES // self._memory.slot_bytes)
        try:
            self._copies.enter_thread()
            for start in range(0, slots, step):
                if self._closing.is_set():
                    return
                self._add_slots(min(step, slots - start))
                while self._idle.is_set() and self._begin_first():
                    self._finish(step)
            while self._idle.wait() and not self._closing.is_set() and self._begin_first():
                self._finish(step)
        except Exception as error:  # noqa: BLE001 - raised again by the next load
            self._error = error
        finally:
            self._finish(0)

    def _add_slots(self, count: int) -> None:
        """New slots are given to experts at once, so that a read that is asked for fills them, too."""
        self._memory.add(count)
        with self._lock:
            for _ in range(count):
                self._cache.add_slot()
                while self._first and self._first[0] in self._cache:
                    self._first.popleft()
                if self._first:
                    key = self._first.popleft()
                    self._cache.take(key)
                    self._cache.unpin(key)
                    self._unread.append(key)

    def _begin_first(self) -> bool:
        """Start the background's next read; False when there is none."""
        with self._lock:
            while self._unread:
                key = self._unread.popleft()
                if key in self._cache and not self._is_here(key):
                    self._cache.pin(key)
                    self._filling.append((key, self._read(key)))
                    return True
        return False

    def _is_here(self, key: ExpertKey) -> bool:
        slot = self._cache.slot(key)
        return slot in self._filled or slot in self._reads

    def _finish(self, left: int) -> None:
        """Wait for reads of the background, the oldest first, until so many are left."""
        while len(self._filling) > left:
            key, read = self._filling.popleft()
            slot = self._cache.slot(key)
            with suppress(HeadraceError):  # raised again by the load that asks for this expert
                self._arrived(slot, read, self._memory.slot(slot, 0))
            with self._lock:
                self._cache.unpin(key)

    def close(self) -> None:
        """End the background, let copies end and free the memory."""
        self._closing.set()
        self._idle.set()
        self._filler.join()
        self._copies.close()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
