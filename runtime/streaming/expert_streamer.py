"""Experts of split layers, fetched into the device's slots when tokens reach them."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Self

import torch

from headrace.runtime.expert_extents import SplitBlock
from headrace.runtime.manifest import Block
from headrace.runtime.memory.held import Holding, named
from headrace.runtime.streaming.host_experts import ExpertKey, HostExperts, Place
from headrace.runtime.streaming.loads import Load, Storage, drain
from headrace.runtime.streaming.reach_history import ReachHistory
from headrace.runtime.streaming.slot_cache import SlotCache
from headrace.runtime.streaming.streamer import wait_clock
from headrace.runtime.streaming.tiers import DeviceRing
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer
from headrace.scheduler.experts import LOOK_AHEAD, passing_slots, slots_ahead
from headrace.scheduler.placement import Tier, spread


@dataclass(frozen=True, slots=True)
class ExpertCounters:
    """What was loaded since the last count: bytes by origin, and seconds that compute stood still.

    `used` counts the experts that were fetched, `loaded` those of them that had to be loaded, be it
    before they were asked for. Bytes of experts that nobody asked for are in the bytes alone.
    """

    nvme_bytes: int
    host_bytes: int
    wait_seconds: float
    used: int
    loaded: int


class ExpertStreamer:
    """One stage's routed experts: `slots` of them on the device, up to `host_slots` in host RAM.

    `blocks` and `splits` have its split layers in visiting order. The constructor returns when the
    slots for what is used most hold evenly spread experts; host RAM is filled in the background.
    `held` is passing_slots'.
    Not thread-safe: one thread computes. The storage stays the caller's and must outlive it.

    Raises StoreError for weights that cannot be read and DoesNotFitError for memory that is not
    there; later on, fetch() raises them.
    """

    def __init__(
        self,
        *,
        blocks: Mapping[int, Block],
        splits: Mapping[int, SplitBlock],
        storage: Storage,
        device: torch.device,
        slots: int,
        slot_bytes: int,
        host_slots: int,
        held: int = 0,
        tracer: Tracer = NULL_TRACER,
    ) -> None:
        self._places = {
            (layer, expert): Place(block.file, block.data_offset + extent.offset, extent.nbytes)
            for layer, block in blocks.items()
            for expert, extent in enumerate(splits[layer].experts)
        }
        self._device, self._tracer = device, tracer
        self._transit = passing_slots(slots, slot_bytes, held)
        self._cache: SlotCache[ExpertKey] = SlotCache(
            slots=slots, transit=self._transit, keys=len(self._places)
        )
        self._loads: dict[int, Load] = {}  # by slot, until somebody waited
        self._unused: set[ExpertKey] = set()  # loaded, but not fetched since
        self._pinned: set[ExpertKey] = set()  # for the fetch at hand
        self._ahead: set[ExpertKey] = set()  # pinned for fetches to come, in transit slots
        self._most_ahead = slots_ahead(self._transit) if slots < len(self._places) else 0
        self._history = {layer: ReachHistory() for layer in blocks}
        self._order: tuple[int, ...] = ()
        self._fetches = self._passes = 0
        self._clock = wait_clock(device)
        self._bytes = dict.fromkeys(Tier, 0)
        self._used = self._loaded = 0
        self._source: HostExperts | None = None
        self._pool: DeviceRing | None = DeviceRing(slots, slot_bytes, device)
        try:
            self._start(storage, slots, slot_bytes, host_slots)
        except BaseException:
            self.close()
            raise

    def _start(self, storage: Storage, slots: int, slot_bytes: int, host_slots: int) -> None:
        kept, others = _spread_out(list(self._places), slots - self._transit)
        for key in kept:
            slot = self._cache.take(key)
            assert slot is not None
            place = self._places[key]
            self._loads[slot] = storage.load(place.file, place.offset, self._memory(slot, key))
        while self._loads:
            self._loads.popitem()[1].wait()
        for key in kept:
            self._cache.unpin(key)
        in_host, rest = _spread_out(others, host_slots)
        self._source = HostExperts(
            self._places,
            [*in_host, *kept, *rest],
            slots=min(host_slots, len(self._places)),
            slot_bytes=slot_bytes,
            storage=storage,
            device=self._device,
            tracer=self._tracer,
        )

    def _memory(self, slot: int, key: ExpertKey) -> torch.Tensor:
        assert self._pool is not None, "closed"
        return self._pool.slot(slot, self._places[key].nbytes)

    def memory(self) -> Iterator[Holding]:
        """What is held for experts, by tier."""
        if self._pool is not None:
            yield from named("experts", [self._pool.memory])
        if self._source is not None:
            yield from self._source.memory()

    def begin_pass(self, order: Sequence[int]) -> None:
        """Say which layers the next pass fetches experts of, one entry a fetch."""
        self._order, self._fetches = tuple(order), 0
        self._passes += 1

    def fetch(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Each of a layer's `experts`, which ascend, with its extent's bytes (uint8), in that order.

        The bytes may be used on the stream that is current here until the next pair is asked for;
        then their slot may be loaded anew behind the work queued so far. Raises StoreError when a
        load failed.
        """
        assert self._order[self._fetches] == layer, f"{layer} fetched, not {self._order}"
        self._fetches += 1
        wanted = [(layer, expert) for expert in experts]
        self._enter(layer, wanted)
        likely, begun, host = self._likely(), 0, self._host
        try:
            for key in wanted:
                begun = self._begin_wanted(wanted, begun)
                if begun == len(wanted):
                    self._begin_ahead(likely)
                yield key[1], self._arrived(key)
                self._release(key)
            self._begin_ahead(likely)
        finally:
            host.resume()

    @property
    def _host(self) -> HostExperts:
        assert self._source is not None, "closed"
        return self._source

    def _enter(self, layer: int, wanted: Sequence[ExpertKey]) -> None:
        """Count uses, and hold what is here already: in transit slots only as much as leaves half
        of them to loads. What is needed last was touched first, and is the first to go."""
        for key in tuple(self._pinned):  # of a fetch that was broken off
            self._release(key)
        for key in [key for key in self._ahead if key[0] == layer]:
            self._ahead.remove(key)
            self._cache.unpin(key)
        # Micro-batches of one pass count once: else the layer at hand would lead all others.
        new = self._history[layer].reach(self._passes, [expert for _, expert in wanted])
        for expert in reversed(new):
            self._cache.use((layer, expert))
        room = self._most_ahead - len(self._ahead)
        for key in wanted:
            if key in self._cache and (self._cache.is_kept(key) or room > 0):
                room -= not self._cache.is_kept(key)
                self._hold(key)
        self._used += len(wanted)

    def _likely(self) -> "deque[ExpertKey]":
        """What the next layers most likely need and is not sure to stay, in the order of fetches."""
        order, at = self._order, self._fetches
        layers = islice(dict.fromkeys(order[at:] + order[:at]), LOOK_AHEAD)
        keys = ((layer, e) for layer in layers for e in self._history[layer].likely())
        missing = (k for k in keys if k not in self._ahead and not self._cache.is_kept(k))
        return deque(islice(missing, self._most_ahead))

    def _begin_wanted(self, wanted: Sequence[ExpertKey], begun: int) -> int:
        """Hold or start to load what comes after the first `begun`, as far as slots go; how many
        are then begun."""
        for key in wanted[begun:]:
            if key in self._cache:
                self._hold(key)
            elif self._begin(key):
                self._pinned.add(key)
                self._host.pause()
            else:
                break
            begun += 1
        return begun

    def _begin_ahead(self, likely: "deque[ExpertKey]") -> None:
        """Hold or start to load what is `likely`, as far as half of the transit slots go: the
        others are left to what routers ask for."""
        while likely and len(self._ahead) < self._most_ahead:
            key = likely[0]
            if key in self._cache:
                self._cache.pin(key)
            elif not self._begin(key):
                break
            self._ahead.add(likely.popleft())

    def _begin(self, key: ExpertKey) -> bool:
        """Load an expert into a slot, if there is one, which is then pinned."""
        slot = self._cache.take(key)
        if slot is None:
            return False
        if slot in self._loads:  # of an expert that was not needed after all
            with self._waiting(key):
                drain([self._loads.pop(slot)])
        try:
            self._loads[slot], tier = self._host.load(key, self._memory(slot, key))
        except BaseException:
            self._cache.unpin(key)
            self._cache.drop(key)
            raise
        self._unused.add(key)
        self._bytes[tier] += self._places[key].nbytes
        return True

    def _arrived(self, key: ExpertKey) -> torch.Tensor:
        slot = self._cache.slot(key)
        load = self._loads.pop(slot, None)
        if load is not None:
            try:
                with self._waiting(key):
                    load.wait()
            except BaseException:
                self._forget(key)
                raise
        if key in self._unused:
            self._unused.remove(key)
            self._loaded += 1
        return self._memory(slot, key)

    @contextmanager
    def _waiting(self, key: ExpertKey) -> Iterator[None]:
        with self._clock.measure(), self._tracer.span(Kind.WEIGHTS_WAIT, number=key[0]):
            yield

    def _hold(self, key: ExpertKey) -> None:
        if key not in self._pinned:
            self._pinned.add(key)
            self._cache.pin(key)

    def _release(self, key: ExpertKey) -> None:
        self._pinned.remove(key)
        self._cache.unpin(key)

    def _forget(self, key: ExpertKey) -> None:
        self._release(key)
        if key in self._ahead:
            self._ahead.remove(key)
            self._cache.unpin(key)
        self._cache.drop(key)

    def take_counters(self) -> ExpertCounters:
        counters = ExpertCounters(
            self._bytes[Tier.NVME],
            self._bytes[Tier.HOST],
            self._clock.take(),
            self._used,
            self._loaded,
        )
        self._bytes = dict.fromkeys(Tier, 0)
        self._used = self._loaded = 0
        return counters

    def wait_host_tier(self) -> None:
        """Return when host RAM is full of experts: before measuring, or to fail early."""
        self._host.wait()

    def close(self) -> None:
        """End the loads under way and free every byte."""
        if self._source is not None:
            self._source.close()
        drain(self._loads.values())
        self._loads.clear()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._source = self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _spread_out(keys: Sequence[ExpertKey], count: int) -> tuple[list[ExpertKey], list[ExpertKey]]:
    """`count` keys, evenly spread, and the others."""
    count = min(count, len(keys))
    chosen = spread(len(keys), count)
    picked = [key for key, is_picked in zip(keys, chosen, strict=True) if is_picked]
    return picked, [key for key, is_picked in zip(keys, chosen, strict=True) if not is_picked]
