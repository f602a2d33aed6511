"""Decodes as CUDA graphs: some layers' kernels are recorded once and then launched together.

A decoder layer is some sixty small kernels. Launching them from Python takes longer than a GPU takes
to run them for a few hundred decodes, and a graph of them is one launch. A graph holds addresses, so
what it reads and writes has to stay in place: a Lane owns the metadata and the hidden states of one
micro-batch of a pass, padded to one of a few sizes, and records a few layers at a time, once for each
place that their weights can lie in.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from headrace.runtime.batch import Batch
from headrace.runtime.kv.store import KVStore
from headrace.runtime.memory.held import Holding, named
from headrace.runtime.model import StageModel
from headrace.runtime.ready import ReadyBatch
from headrace.runtime.recording import Capture
from headrace.scheduler.pages import pages_for
from headrace.scheduler.plan import MicroBatch

log = logging.getLogger(__name__)

LEAST_PAGES = 4
"""Pages that every lane has room for."""

LAYERS = 4
"""Layers of a graph. The device begins when a launch ends, which takes 0.6 ms for 32 layers on an H200,
and goes on to compute longer than the next launches take."""

IDLE = 64
"""A lane makes room for another when it was not used for so many micro-batches for each lane there is.
So a run whose sizes change for ever spends its time on replaying, not on recording."""

SELDOM = 64
"""So many micro-batches of a new size are padded to a lane that there is. A lane of its own costs a pass that is
launched kernel by kernel and a recording, rows too many a little more of each pass; batches that shrink at a
run's end have each size for a few passes."""

Layers = Sequence[tuple[int, Tensor]]


Record = Callable[[Callable[[], None], int], Callable[[], None] | None]
"""Like Capture.record for as much as so many layers, but None where nothing could be recorded."""


class Lane:
    """Where one micro-batch of decodes is from pass to pass. Loaded and run on one stream.

    What one recording leaves for another lies in memory from outside of recordings: what they take for
    themselves is shared by all of them, in the order in which they were made, not in which they are used.
    `recorded`: as much as so many layers. `used`: when, as its owner counts.
    """

    def __init__(self, model: StageModel, kv: KVStore, record: Record, batch: Batch) -> None:
        self._model, self._kv, self._record = model, kv, record
        self._batch = batch
        self._rows = model.rows(batch)
        self.prepared = model.enter(self._rows, batch)
        self._x = self.prepared.x.clone()
        self._enter = record(self._do_enter, 1)
        self.recorded = 1
        self.used = 0
        self._warm: set[tuple[int, ...]] = set()
        self._replays: dict[tuple[int, ...], Callable[[], None]] = {}

    @property
    def is_usable(self) -> bool:
        return self._enter is not None

    def tensors(self) -> Iterator[Tensor]:
        """What it keeps; some are views of each other."""
        batch = (getattr(self._batch, field.name) for field in fields(self._batch))
        yield from _tensors((*batch, self._rows, self._x, self.prepared.x, self.prepared.calls))

    def load(self, batch: Batch, count: int) -> None:
        """Take over a batch on the host of the same shape, of which the first `count` rows count."""
        assert self._enter is not None
        here = batch.to(self._model.device, onto=self._batch)
        self._model.rows(here, onto=self._rows)
        self._enter()
        self.prepared = replace(self.prepared, batch=here, x=self._x[:count])

    def run(self, layers: Layers, x: Tensor) -> Tensor:
        """Run a visit's layers on x [count, hidden]; returns the same, valid until the next run."""
        self._take(x)
        for start in range(0, len(layers), LAYERS):
            self._run_or_replay(layers[start : start + LAYERS])
        return self._x[: len(x)]

    def _run_or_replay(self, layers: Layers) -> None:
        key = (layers[0][0], *(block.data_ptr() for _, block in layers))
        again = self._replays.get(key) or self._recorded(key, layers)
        if again is None:
            # Kernels are compiled and tuned now, which a recording could not do.
            self._warm.add(key)
            self._run(layers)
        else:
            for layer, block in layers:
                if self._model.interrupts(layer):
                    self._model.bind(layer, block)  # what the host queues reads it, too
            again()

    def _recorded(self, key: tuple[int, ...], layers: Layers) -> Callable[[], None] | None:
        if key not in self._warm or not all(self._model.is_static(layer) for layer, _ in layers):
            return None
        for layer, block in layers:
            self._model.bind(layer, block)
        again = self._record(lambda: self._run(layers), len(layers))
        if again is not None:
            self._replays[key] = again
            self.recorded += len(layers)
        return again

    def _do_enter(self) -> None:
        entered = self._model.enter(self._rows, self._batch)
        self._x.copy_(entered.x)
        _copy_tensors(entered.calls, self.prepared.calls)

    def _run(self, layers: Layers) -> None:
        self._x.copy_(self._model.run_layers(layers, self._x, self.prepared, self._kv))

    def _take(self, x: Tensor) -> None:
        if x.data_ptr() != self._x.data_ptr():
            self._x[: len(x)].copy_(x)
            self._x[len(x) :].copy_(x[-1:].expand(len(self._x) - len(x), -1))


class DecodeGraphs:
    """The lanes of a stage, for at most `max_rows` sequences of at most `max_pages` pages each.

    It keeps `max_lanes` lanes, and recordings of as much as `max_layers` layers for all of them:
    the driver takes some of the device's memory for each. What has no room is not recorded.
    """

    def __init__(
        self,
        model: StageModel,
        kv: KVStore,
        capture: Capture,
        *,
        max_rows: int,
        max_pages: int,
        max_lanes: int,
        max_layers: int,
    ) -> None:
        self._model, self._kv, self._capture = model, kv, capture
        self._max_rows, self._max_pages = max_rows, max_pages
        self._max_lanes, self._max_layers = max_lanes, max_layers
        self._lanes: dict[tuple[int, int, int], Lane] = {}
        self._asked: Counter[tuple[int, int, int]] = Counter()
        self._loads = 0
        self._failed = False

    @property
    def recorded(self) -> int:
        """Layers that recordings are kept of; what precedes the layers counts as one."""
        return sum(lane.recorded for lane in self._lanes.values())

    def memory(self) -> Iterator[Holding]:
        """What lanes keep outside of recordings."""
        for lane in self._lanes.values():
            yield from named("graphs", lane.tensors())

    def ready(self, index: int, micro_batch: MicroBatch) -> ReadyBatch | None:
        """A pass's micro-batch `index` padded for a lane, on any thread.

        None when it holds more than decodes, or more of them than lanes have rows, or some with adapters.
        """
        slices = micro_batch.slices
        rows = min(padded_rows(len(slices)), self._max_rows)
        if self._failed or len(slices) > rows or any(len(piece.tokens) > 1 for piece in slices):
            return None
        if any(piece.adapter is not None for piece in slices):
            return None  # which rows are multiplied by what differs from pass to pass
        longest = max(piece.start for piece in slices) + 1
        pages = min(padded_pages(pages_for(longest)), self._max_pages)
        rows, pages = self._size(index, rows, pages)
        # A row that is there twice writes the same key to the same place, and harms nobody.
        again = slices[-1]._replace(sampling=None)
        padded = MicroBatch(slices + (again,) * (rows - len(slices)))
        return ReadyBatch.build(micro_batch, self._model.device, padded, pages)

    def _size(self, index: int, rows: int, pages: int) -> tuple[int, int]:
        """Of the lane for so many rows and pages: as large, or a larger one that is recorded."""
        key = index, rows, pages
        self._asked[key] += 1
        # Another thread may make lanes meanwhile.
        lanes = self._lanes.copy()
        if key in lanes or self._asked[key] > SELDOM:
            return rows, pages
        larger = [
            (other_rows, other_pages)
            for (place, other_rows, other_pages), lane in lanes.items()
            if place == index and other_rows >= rows and other_pages >= pages and lane.recorded > 1
        ]
        return min(larger, default=(rows, pages))

    def lane(self, index: int, ready: ReadyBatch) -> Lane | None:
        """A lane loaded with a pass's micro-batch `index`, which `ready` padded.

        None when there is no room for another lane, or when a layer cannot be recorded.
        """
        rows, pages = ready.batch.page_table.shape
        key = index, rows, pages
        self._loads += 1
        if self._failed or (key not in self._lanes and not self._make_room()):
            return None
        lane = self._lanes.get(key) or self._new_lane(ready.batch)
        if not lane.is_usable:
            return None
        self._lanes[key] = lane
        lane.used = self._loads
        lane.load(ready.batch, len(ready.micro_batch.slices))
        return lane

    def _new_lane(self, batch: Batch) -> Lane:
        return Lane(self._model, self._kv, self._record, batch.to(self._model.device))

    def _make_room(self) -> bool:
        """Whether there is room for one more lane, and were it in place of one that is out of use."""
        if len(self._lanes) < self._max_lanes and self.recorded < self._max_layers:
            return True
        oldest = min(self._lanes, key=lambda key: self._lanes[key].used, default=None)
        if oldest is None or self._loads - self._lanes[oldest].used <= IDLE * len(self._lanes):
            return False
        del self._lanes[oldest]
        return True

    def _record(self, work: Callable[[], None], layers: int) -> Callable[[], None] | None:
        if self._failed or self.recorded + layers > self._max_layers:
            return None
        try:
            return self._capture.record(work)
        except RuntimeError as error:
            self._failed = True
            reason = str(error).splitlines()[0]
            log.warning("decodes are launched kernel by kernel, not as CUDA graphs: %s", reason)
            return None


def _copy_tensors(source: Any, dest: Any) -> None:
    """Copy each tensor in `source` onto the one that is there in `dest`, which is made alike."""
    copied = set()
    for new, old in zip(_tensors(source), _tensors(dest), strict=True):
        if old.data_ptr() not in copied and new.data_ptr() != old.data_ptr():
            old.copy_(new)
            copied.add(old.data_ptr())


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        yield from _tensors(tuple(x.values()))
    elif isinstance(x, (tuple, list)):
        for part in x:
            yield from _tensors(part)


def padded_rows(count: int) -> int:
    """Few sizes, so that few graphs are made, and little padding."""
    step = 8 if count <= 64 else 32
    return power_of_two(count) if count <= 8 else -(-count // step) * step


def padded_pages(count: int) -> int:
    """Fewer sizes still: what is not read of a page table costs little."""
    pages = LEAST_PAGES
    while pages < count:
        pages *= 4
    return pages


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
