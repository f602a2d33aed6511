"""A ring through which pages in host RAM and on NVMe pass on their way to attention.

A request whose full pages lie in host slots goes on decoding: for each layer that its micro-batch runs
through, the layer's part of these pages is brought into a slot of the ring, on a stream of its own and
a layer ahead, and the pages of the request that are on the device are copied beside them. Over the slot
lies the same view as over a layer's pages, so that the layer attends as it always does, with a page
table of places in the ring, and to the same bits. What it writes is then copied to the device page
that it belongs to.

Pages on NVMe are read to staging memory as soon as the slot's use is begun, and copied from there when the
reads have ended, which attention waits for. One that cannot be had is zeros for everything that is computed
in the pass, which is worth nothing then for its request, and no different for all others.

Order. The layers and micro-batches of a pass that need the ring are known when it begins, and use
the slots in turn. A slot is filled behind the attention that used it before, and attention is queued
behind its filling. Host slots hold still: the scheduler lets nothing write to them while a pass that
names them is under way, and a stage ends a pass when all that it queued is done.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Self

import torch
from torch import Tensor

from headrace.runtime.kv.cold_batch import ColdBatch
from headrace.runtime.kv.host import HostPages
from headrace.runtime.kv.page_copies import copy_pages
from headrace.runtime.kv.store import KVStore, LayerKV, QuantizedKV
from headrace.runtime.kv.window import PageWindow
from headrace.runtime.kv.window_reads import Reading, WindowReads
from headrace.runtime.memory.held import Holding, named
from headrace.runtime.streaming.loads import queued_work
from headrace.runtime.streaming.streamer import HostClock, wait_clock
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer
from headrace.scheduler.memory import KV_RING_SLOTS


class _Filled(NamedTuple):
    """A slot of the ring that is being filled; `free` and `arrived` are events on CUDA: from when on the
    slot is, and when what comes from host slots has."""

    layer: int
    batch: ColdBatch
    slot: int
    free: torch.cuda.Event | None
    arrived: torch.cuda.Event | None
    reading: Reading | None


class Brought(NamedTuple):
    """What was brought: bytes in all, seconds that attention waited for them, bytes that were read from
    NVMe for it, and requests of which something there could not be had."""

    nbytes: int
    seconds: float
    sunk_bytes: int
    spoiled: tuple[int, ...]


NOTHING_BROUGHT = Brought(0, 0.0, 0, ())


class KVRing:
    """`slots` slots, each for `num_pages` pages of any one of a stage's layers.

    `host`, `kv` and `window`, where pages on NVMe lie, stay the caller's. Methods are called on the stream
    that computes.
    """

    def __init__(
        self,
        kv: KVStore,
        host: HostPages,
        num_pages: int,
        device: torch.device,
        tracer: Tracer = NULL_TRACER,
        slots: int = KV_RING_SLOTS,
        window: PageWindow | None = None,
    ) -> None:
        assert num_pages > 0 and slots > 1
        self._kv, self._device, self._tracer = kv, device, tracer
        self._host = {layer: host.pages(i) for i, layer in enumerate(kv.layers)}
        self.num_pages, self._num_slots = num_pages, slots
        # Zeros: what was never written must be numbers, too.
        largest = max(map(kv.page_bytes, kv.layers))
        self._memory = torch.zeros((slots, num_pages * largest), dtype=torch.uint8, device=device)
        self._views: dict[tuple[int, int], tuple[Tensor, LayerKV | QuantizedKV]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._read_stream: torch.cuda.Stream | None = None
        self._windows: dict[int, int | None] = {}  # of layers that have attended
        self._uses: deque[tuple[int, ColdBatch]] = deque()
        self._filled: deque[_Filled] = deque()
        self._begun = 0
        self._reads: WindowReads | None = None
        if window is not None:
            self.attach(window)
        # When what was last copied from a slot's staging memory had been: it may be read to then.
        self._copied: list[torch.cuda.Event | None] = [None] * slots
        self._bytes = self._sunk_bytes = 0
        self._spoiled: set[int] = set()
        self._clock = wait_clock(device)
        self._reads_clock = HostClock()

    def attach(self, window: PageWindow) -> None:
        """Bring pages from there, too, from now on."""
        assert self._reads is None
        if self._device.type == "cuda":
            self._read_stream = torch.cuda.Stream(self._device)
        self._reads = WindowReads(
            window, self._num_slots, self.num_pages, self._device, self._tracer
        )

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def memory(self) -> Iterator[Holding]:
        """The slots, and where pages from NVMe are read to."""
        yield from named("kv_ring", [self._memory])
        if self._reads is not None:
            yield from self._reads.memory()

    def begin_pass(self, uses: Iterable[tuple[int, ColdBatch]]) -> None:
        """Layers and micro-batches that need the ring, in the order in which they will."""
        self._drain()
        self._uses = deque(uses)
        for _ in range(self._num_slots):
            self._fill_next()

    def pages(self, batch: ColdBatch) -> "RingPages":
        """The micro-batch's LayerPages."""
        return RingPages(self, batch)

    def take(self) -> Brought:
        """What was brought since the last call."""
        seconds = self._clock.take() + self._reads_clock.take()
        brought = Brought(self._bytes, seconds, self._sunk_bytes, tuple(sorted(self._spoiled)))
        self._bytes = self._sunk_bytes = 0
        self._spoiled.clear()
        return brought

    @contextmanager
    def using(
        self, batch: ColdBatch, layer: int, window: int | None
    ) -> Iterator[LayerKV | QuantizedKV]:
        """LayerPages.using for the use that is next."""
        filled = self._filled.popleft()
        assert filled.layer == layer and filled.batch is batch, (layer, filled.layer)
        self._windows[layer] = window
        if filled.reading is not None:
            self._bring(filled, filled.reading)
        if filled.arrived is not None:
            with self._clock.measure():
                torch.cuda.current_stream(self._device).wait_event(filled.arrived)
        own = self._kv.pages(layer)
        pages, view = self._view(layer, filled.slot)
        copy_pages(own, pages, batch.inwards)
        yield view
        copy_pages(pages, own, batch.outwards)
        self._fill_next()

    def _fill_next(self) -> None:
        """Begin to bring what the use after those under way needs, behind what is queued by now."""
        if not self._uses:
            return
        layer, batch = self._uses.popleft()
        assert batch.num_pages <= self.num_pages, (batch.num_pages, self.num_pages)
        slot = self._begun % self._num_slots
        self._begun += 1
        # Before a layer has attended, nobody knows how far it looks back.
        window = self._windows.get(layer)
        ids, sunk = batch.cold(window), batch.sunk(window)
        nbytes = len(ids) * self._kv.page_bytes(layer)
        pages, _ = self._view(layer, slot)
        reading = None
        if sunk is not None:
            assert self._reads is not None, "pages are on NVMe and the stage has no slots there"
            reading = self._reads.begin(layer, slot, sunk, self._copied[slot])
        free = queued_work(self._device)
        with self._beside(), self._tracer.span(Kind.KV_COPY, "ring", layer, nbytes):
            copy_pages(self._host[layer], pages, ids, over_link=True)
            arrived = queued_work(self._device)
        self._bytes += nbytes
        self._filled.append(_Filled(layer, batch, slot, free, arrived, reading))

    def _bring(self, filled: _Filled, reading: Reading) -> None:
        """Wait for what is read, and have attention wait until it is in the ring."""
        with self._reads_clock.measure(), self._tracer.span(Kind.KV_WAIT, "window", filled.layer):
            lost = reading.wait()
        if len(lost):
            reading.rows[torch.from_numpy(lost)] = 0
            self._spoiled.update(reading.sunk.owners[lost].tolist())
        nbytes = reading.rows.nbytes
        pages, _ = self._view(filled.layer, filled.slot)
        with (
            self._apart(filled.free),
            self._tracer.span(Kind.KV_COPY, "ring", filled.layer, nbytes),
        ):
            copy_pages(reading.rows, pages, reading.sunk.ids, over_link=True)
            copied = queued_work(self._device)
        self._copied[filled.slot] = copied
        if copied is not None:
            with self._clock.measure():
                torch.cuda.current_stream(self._device).wait_event(copied)
        self._bytes += nbytes
        self._sunk_bytes += reading.nbytes

    @contextmanager
    def _apart(self, free: torch.cuda.Event | None) -> Iterator[None]:
        """On the stream for copies of what was read, behind `free`: not behind the next slot's, too."""
        if self._read_stream is None or free is None:
            with self._clock.measure():
                yield
            return
        self._read_stream.wait_event(free)
        with torch.cuda.stream(self._read_stream):
            yield

    def _drain(self) -> None:
        """Have nothing read to staging memory any more."""
        while self._filled:
            reading = self._filled.popleft().reading
            if reading is not None:
                reading.drain()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream for copies, behind what the current one holds."""
        if self._stream is None:
            with self._clock.measure():
                yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def _view(self, layer: int, slot: int) -> tuple[Tensor, LayerKV | QuantizedKV]:
        """The slot's pages of a layer, uint8 [num_pages, page_bytes], and as attention sees them."""
        key = layer, slot
        if key not in self._views:
            size = self._kv.page_bytes(layer)
            pages = self._memory[slot, : self.num_pages * size].view(self.num_pages, size)
            self._views[key] = pages, self._kv.over(layer, pages)
        return self._views[key]

    def close(self) -> None:
        """Return when nothing reads host slots any more. Safe to call twice."""
        for stream in (self._stream, self._read_stream):
            if stream is not None:
                stream.synchronize()
        if self._reads is not None:
            self._reads.close()
            self._reads = None
        self._views.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RingPages:
    """Where layers find the pages of one micro-batch with cold pages."""

    def __init__(self, ring: KVRing, batch: ColdBatch) -> None:
        self._ring, self._batch = ring, batch

    def using(
        self, layer: int, window: int | None
    ) -> AbstractContextManager[LayerKV | QuantizedKV]:
        return self._ring.using(self._batch, layer, window)
