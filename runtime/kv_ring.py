"""A ring through which pages in host RAM pass on their way to attention.

A request whose full pages lie in host slots goes on decoding: for each layer that its micro-batch runs
through, the layer's part of these pages is brought into a slot of the ring, on a stream of its own and
a layer ahead, and the pages of the request that are on the device are copied beside them. Over the slot
lies the same view as over a layer's pages, so that the layer attends as it always does, with a page
table of places in the ring, and to the same bits. What it writes is then copied to the device page
that it belongs to.

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

from headrace.runtime.cold_batch import ColdBatch
from headrace.runtime.kv_host import HostPages
from headrace.runtime.kv_store import KVStore, LayerKV, QuantizedKV
from headrace.runtime.page_copies import copy_pages
from headrace.runtime.streaming.loads import queued_work
from headrace.runtime.streaming.streamer import wait_clock
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer
from headrace.scheduler.memory import KV_RING_SLOTS


class _Filled(NamedTuple):
    """A slot of the ring that is being filled; `arrived` is an event on CUDA."""

    layer: int
    batch: ColdBatch
    slot: int
    arrived: torch.cuda.Event | None


class KVRing:
    """`slots` slots, each for `num_pages` pages of any one of a stage's layers.

    `host` and `kv` stay the caller's. Methods are called on the stream that computes.
    """

    def __init__(
        self,
        kv: KVStore,
        host: HostPages,
        num_pages: int,
        device: torch.device,
        tracer: Tracer = NULL_TRACER,
        slots: int = KV_RING_SLOTS,
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
        self._windows: dict[int, int | None] = {}  # of layers that have attended
        self._uses: deque[tuple[int, ColdBatch]] = deque()
        self._filled: deque[_Filled] = deque()
        self._begun = 0
        self._bytes = 0
        self._clock = wait_clock(device)

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def begin_pass(self, uses: Iterable[tuple[int, ColdBatch]]) -> None:
        """Layers and micro-batches that need the ring, in the order in which they will."""
        self._uses, self._filled = deque(uses), deque()
        for _ in range(self._num_slots):
            self._fill_next()

    def pages(self, batch: ColdBatch) -> "RingPages":
        """The micro-batch's LayerPages."""
        return RingPages(self, batch)

    def take(self) -> tuple[int, float]:
        """Bytes brought since the last call, and seconds that attention waited for them."""
        nbytes, self._bytes = self._bytes, 0
        return nbytes, self._clock.take()

    @contextmanager
    def using(
        self, batch: ColdBatch, layer: int, window: int | None
    ) -> Iterator[LayerKV | QuantizedKV]:
        """LayerPages.using for the use that is next."""
        filled = self._filled.popleft()
        assert filled.layer == layer and filled.batch is batch, (layer, filled.layer)
        self._windows[layer] = window
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
        ids = batch.cold(self._windows.get(layer))
        nbytes = len(ids) * self._kv.page_bytes(layer)
        pages, _ = self._view(layer, slot)
        with self._beside(), self._tracer.span(Kind.KV_COPY, "ring", layer, nbytes):
            copy_pages(self._host[layer], pages, ids, over_link=True)
            arrived = queued_work(self._device)
        self._bytes += nbytes
        self._filled.append(_Filled(layer, batch, slot, arrived))

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
        if self._stream is not None:
            self._stream.synchronize()
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
