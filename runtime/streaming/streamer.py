"""Which layer is loaded next, into which slot: keeps the ring full while the stage computes."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from headrace.runtime.manifest import Block
from headrace.runtime.memory.held import Holding, named
from headrace.runtime.streaming.loads import Load, Storage, drain
from headrace.runtime.streaming.tiers import DeviceRing, HostTier, device_bytes
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer
from headrace.scheduler.placement import Tier


@dataclass(frozen=True, slots=True)
class StreamCounters:
    """Bytes of the layers held since the last count, by tier, and seconds that compute stood still.

    On CUDA the seconds are the compute stream's, and a wait that is still under way when it is
    asked for is counted next time.
    """

    nvme_bytes: int
    host_bytes: int
    wait_seconds: float


class WaitClock(Protocol):
    """Sums how long weights were waited for."""

    def measure(self) -> AbstractContextManager[None]: ...

    def take(self) -> float:
        """Seconds since the last call."""


class HostClock:
    """For a CPU, where the thread that waits is the one that computes."""

    def __init__(self) -> None:
        self._seconds = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start

    def take(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class StreamClock:
    """For CUDA: the time between two events on the compute stream, read without waiting for them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def measure(self) -> Iterator[None]:
        start = self._now()
        yield
        self._waits.append((start, self._now()))

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def take(self) -> float:
        milliseconds = 0.0
        while self._waits and self._waits[0][1].query():
            start, end = self._waits.popleft()
            milliseconds += start.elapsed_time(end)
        return milliseconds / 1e3


def wait_clock(device: torch.device) -> WaitClock:
    return StreamClock(device) if device.type == "cuda" else HostClock()


class Prefetcher:
    """Streamed layers pass through the ring in cyclic order; every free slot is being loaded.

    The n-th load goes to slot n mod slots, so slots are taken and given back in the same order.
    `begin(layer, dest)` starts a load behind the current stream's work.
    """

    def __init__(
        self,
        order: Sequence[int],
        nbytes: Mapping[int, int],
        ring: DeviceRing,
        begin: Callable[[int, torch.Tensor], Load],
    ) -> None:
        assert order
        self._order = tuple(order)
        self._nbytes = nbytes
        self._ring = ring
        self._begin = begin
        self._begun = 0
        self._loads: deque[tuple[int, torch.Tensor, Load]] = deque()
        self._fill()

    def _fill(self) -> None:
        for _ in range(self._ring.slots):
            self._load_next()

    def _load_next(self) -> None:
        layer = self._order[self._begun % len(self._order)]
        dest = self._ring.slot(self._begun % self._ring.slots, self._nbytes[layer])
        self._loads.append((layer, dest, self._begin(layer, dest)))
        self._begun += 1

    def wait(self, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """The bytes of the next layers in order, when they are there. Raises StoreError."""
        assert len(layers) <= self._ring.slots, f"{layers} need more than {self._ring.slots} slots"
        coming = [self._loads[i] for i in range(len(layers))]
        assert [layer for layer, _, _ in coming] == list(layers), "visited out of order"
        for _, _, load in coming:
            load.wait()
        return {layer: data for layer, data, _ in coming}

    def release(self, count: int) -> None:
        """Give the oldest `count` slots to the next loads, behind the current stream's work."""
        for _ in range(count):
            self._loads.popleft()
            self._load_next()

    def restart(self) -> None:
        """Begin again with the first layer, in the first slot."""
        self.drain()
        self._begun = 0
        self._fill()

    def memory(self) -> Iterator[Holding]:
        return named("ring", [self._ring.memory])

    def drain(self) -> None:
        """Return when nothing writes to the ring any more, as seen by the current stream."""
        drain(load for _, _, load in self._loads)
        self._loads.clear()


class Streamer:
    """One stage's weights: resident ones on the device, the others passing through the ring.

    `visits` are this stage's, as layer indices in ring order; `blocks` and `tiers` have its layers.
    The constructor begins to load the resident layers, then the ring, and the host tier in the
    background; `wait_resident` and the first hold() wait for the resident ones. Not thread-safe: one
    thread computes. The storage stays the caller's and must outlive the streamer.

    Raises DoesNotFitError for device memory that is not there; waiting raises it for host memory,
    and StoreError for weights that cannot be read.
    """

    def __init__(
        self,
        *,
        visits: Sequence[Sequence[int]],
        blocks: Mapping[int, Block],
        tiers: Mapping[int, Tier],
        storage: Storage,
        device: torch.device,
        ring_slots: int,
        slot_bytes: int,
        tracer: Tracer = NULL_TRACER,
    ) -> None:
        self._visits = tuple(tuple(visit) for visit in visits)
        self._blocks = blocks
        self._tiers = tiers
        self._storage = storage
        self._device = device
        self._resident: dict[int, torch.Tensor] = {}
        self._resident_loads: list[Load] = []
        self._host: HostTier | None = None
        self._ring: Prefetcher | None = None
        self._position = 0
        self._bytes = dict.fromkeys(Tier, 0)
        self._clock = wait_clock(device)
        self._tracer = tracer
        self._closed = False
        try:
            self._start(ring_slots, slot_bytes)
        except BaseException:
            self.close()
            raise

    def _start(self, ring_slots: int, slot_bytes: int) -> None:
        layers = [layer for visit in self._visits for layer in visit]
        for layer in layers:
            if self._tiers[layer] is Tier.DEVICE:
                self._load_resident(layer)
        host = {i: self._blocks[i] for i in layers if self._tiers[i] is Tier.HOST}
        if host:
            self._host = HostTier(host, self._storage, self._device, self._tracer)
        order = [i for i in layers if self._tiers[i] is not Tier.DEVICE]
        if order:
            sizes = {i: self._blocks[i].nbytes for i in order}
            ring = DeviceRing(ring_slots, slot_bytes, self._device)
            self._ring = Prefetcher(order, sizes, ring, self._begin)

    def _load_resident(self, layer: int) -> None:
        block = self._blocks[layer]
        memory = self._resident[layer] = device_bytes(block.nbytes, self._device)
        self._resident_loads.append(self._storage.load(block.file, block.data_offset, memory))

    def wait_resident(self) -> None:
        """Return when the resident layers are on the device. Raises StoreError."""
        if self._resident_loads:
            for load in self._resident_loads:
                load.wait()
            self._resident_loads.clear()
            self._synchronize()

    @property
    def resident(self) -> Mapping[int, torch.Tensor]:
        """The bytes of the layers that stay where they are; what they hold is the caller's affair."""
        self.wait_resident()
        return self._resident

    def _begin(self, layer: int, dest: torch.Tensor) -> Load:
        if self._tiers[layer] is Tier.HOST:
            assert self._host is not None
            return self._host.load(layer, dest)
        block = self._blocks[layer]
        return self._storage.load(block.file, block.data_offset, dest)

    @contextmanager
    def hold(self, visit: int) -> Iterator[list[tuple[int, torch.Tensor]]]:
        """The visit's layers and their bytes (uint8, exactly block.nbytes), in visiting order.

        Visits are held one at a time, in order, round and round. The bytes may be used on the
        stream that is current here until the block is left; then the slots are loaded anew behind
        the work queued so far. Raises StoreError when a load failed.
        """
        assert not self._closed
        assert visit == self._position, f"visit {visit} held, {self._position} is next"
        layers = self._visits[visit]
        streamed = [layer for layer in layers if self._tiers[layer] is not Tier.DEVICE]
        self.wait_resident()
        weights = self._resident | self._wait(streamed)
        self._position = (visit + 1) % len(self._visits)
        try:
            yield [(layer, weights[layer]) for layer in layers]
        finally:
            self._count(streamed, weights)
            if self._ring is not None and not self._closed:
                self._ring.release(len(streamed))

    def _wait(self, streamed: Sequence[int]) -> dict[int, torch.Tensor]:
        if self._ring is None or not streamed:
            return {}
        with self._clock.measure(), self._tracer.span(Kind.WEIGHTS_WAIT, number=streamed[0]):
            return self._ring.wait(streamed)

    def _count(self, streamed: Sequence[int], weights: Mapping[int, torch.Tensor]) -> None:
        for layer in streamed:
            assert weights[layer].nbytes == self._blocks[layer].nbytes
            self._bytes[self._tiers[layer]] += weights[layer].nbytes

    def rewind(self) -> None:
        """The first visit is next, whichever was held last; what was counted is forgotten."""
        if self._ring is not None and self._position:
            self._ring.restart()
        self._position = 0
        self.take_counters()

    def take_counters(self) -> StreamCounters:
        """What was held since the last call; after a whole pass, exactly the plan's bytes."""
        counters = StreamCounters(
            self._bytes[Tier.NVME], self._bytes[Tier.HOST], self._clock.take()
        )
        self._bytes = dict.fromkeys(Tier, 0)
        return counters

    def wait_host_tier(self) -> None:
        """Return when every host layer is in RAM: before measuring, or to fail early."""
        if self._host is not None:
            self._host.wait()

    def memory(self) -> Iterator[Holding]:
        """What is held for layers, by tier."""
        yield from named("resident", self._resident.values())
        if self._ring is not None:
            yield from self._ring.memory()
        if self._host is not None:
            yield from self._host.memory()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        """End the loads under way and free every byte."""
        if self._closed:
            return
        self._closed = True
        if self._host is not None:
            self._host.close()
        if self._ring is not None:
            self._ring.drain()
        drain(self._resident_loads)  # those that a start which failed left behind
        self._resident_loads.clear()
        self._synchronize()
        self._host = self._ring = None
        self._resident.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
