"""Reads of pages on NVMe on their way to a KV ring: by threads, to staging memory, verified there.

Weights come first on the drive: a thread reads no more than a piece at a time, and few threads do.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.runtime.kv.cold_batch import Sunk
from headrace.runtime.kv.window import PageWindow
from headrace.runtime.memory.held import Holding, named
from headrace.runtime.streaming.tiers import AlignedBuffer
from headrace.runtime.trace import Kind, Tracer
from headrace.scheduler.memory import WINDOW_PIECE_BYTES, WINDOW_THREADS


class _Run(NamedTuple):
    """Rows [begin, end) of what is asked for, whose slots follow one another."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Reading:
    """Pages on their way to `rows`, uint8 [n, bytes of a page], in the order of `sunk`."""

    sunk: Sunk
    rows: Tensor
    nbytes: int  # that are read
    runs: Sequence[tuple[_Run, Future[list[int]]]]

    def wait(self) -> np.ndarray:
        """Which rows could not be had, when all others are there."""
        lost = [run.begin + row for run, read in self.runs for row in read.result()]
        return np.array(sorted(lost), np.int64)

    def drain(self) -> None:
        """Return when nothing is written to the rows any more."""
        for _, read in self.runs:
            read.exception()


class WindowReads:
    """Reads for a ring of `slots` slots, each for `num_pages` pages; `window` stays the caller's."""

    def __init__(
        self, window: PageWindow, slots: int, num_pages: int, device: torch.device, tracer: Tracer
    ) -> None:
        self._window, self._tracer = window, tracer
        largest = max(window.page_bytes.values())
        pinned = device.type == "cuda"
        size = slots * num_pages * largest
        self._buffer = AlignedBuffer(size, pinned=pinned, option="--kv-host-memory")
        self._staging = self._buffer.tensor.view(slots, num_pages * largest)
        # Else a thread's first CUDA call would open a context on device 0.
        enter = partial(torch.cuda.set_device, torch.cuda.current_device()) if pinned else None
        self._threads = ThreadPoolExecutor(WINDOW_THREADS, "headrace-kv-window", enter)

    def begin(self, layer: int, slot: int, sunk: Sunk, after: torch.cuda.Event | None) -> Reading:
        """Begin to read the layer's parts of pages to the slot's staging memory, from which nothing is
        copied any more once `after` has happened."""
        count, size = len(sunk.slots), self._window.page_bytes[layer]
        stride = self._window.stride(layer)
        rows = self._staging[slot, : count * size].view(count, size)
        dest = rows.numpy()
        runs = []
        for run in _runs(sunk.slots, max(1, WINDOW_PIECE_BYTES // stride)):
            first, part = int(sunk.slots[run.begin]), dest[run.begin : run.end]
            runs.append((run, self._threads.submit(self._read, layer, first, part, after)))
        return Reading(sunk, rows, count * stride, runs)

    def _read(
        self, layer: int, first: int, dest: np.ndarray, after: torch.cuda.Event | None
    ) -> list[int]:
        if after is not None:
            after.synchronize()
        with self._tracer.span(Kind.KV_LOG, "window", layer, dest.nbytes):
            return self._window.read(layer, first, dest)

    def memory(self) -> Iterator[Holding]:
        return named("host_window", [self._buffer.tensor])

    def close(self) -> None:
        """Let what is being read end; the rest is dropped."""
        self._threads.shutdown(cancel_futures=True)
        self._buffer.close()


def _runs(slots: np.ndarray, most: int) -> list[_Run]:
    """Ascending slots, cut where they do not follow one another and into runs of at most `most`."""
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    bounds = [0, *breaks.tolist(), len(slots)]
    return [
        _Run(start, min(start + most, end))
        for begin, end in pairwise(bounds)
        for start in range(begin, end, most)
    ]
