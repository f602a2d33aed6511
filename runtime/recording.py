"""What is recorded as CUDA graphs, and what the host does between them.

Most of a layer is queued without a look at what it computes, and can be recorded. Where the host has to
know something, such as which experts tokens reach, the recording is interrupted: doing it again launches
the graph before, does the host's part anew, and launches the graph after.
"""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.runtime.trace import NULL_TRACER, Kind, Tracer

_ONE_AT_A_TIME = threading.Lock()
"""Held while something is recorded, for which the garbage collection of the process stops."""

HostWork = Callable[..., None]
"""Called with the values of a tensor (a list) and with tensors, which it may write to."""


class Capture(Protocol):
    """Makes one launch of many."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does `work` again with what lies in the same memory then. `work` is not done now."""


Interrupt = Callable[..., tuple[Tensor, ...]]
"""Interruptions' own __call__."""


class Interruptions:
    """Where layers have the host do something with what they computed so far, recorded or not."""

    def __init__(self) -> None:
        self._interrupt: Interrupt = _work_now

    def __call__(self, work: HostWork, asked: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Have `work(values of asked [n], *those)` done here, now or whenever what is recorded is done
        again. Returns the tensors to go on with in the place of `tensors`, which are `those`."""
        return self._interrupt(work, asked, *tensors)

    @contextmanager
    def by(self, interrupt: Interrupt) -> Iterator[None]:
        """Leave it to `interrupt` for a while."""
        before, self._interrupt = self._interrupt, interrupt
        try:
            yield
        finally:
            self._interrupt = before


def _work_now(work: HostWork, asked: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    work(_values(asked), *tensors)
    return tensors


def _values(x: Tensor) -> list[Any]:
    """The values of x [n], when the device has come so far."""
    if not x.is_cuda:
        return list(x.tolist())
    # Imported where it is needed: installations without a GPU have no Triton.
    from headrace.runtime.zero_copy import read_back

    return read_back(x)


class CudaCapture:
    """CUDA graphs of what is queued on the current stream, all with one pool of memory.

    They are recorded on a stream of their own. When another thread lets go of pinned memory that was
    copied from on the stream that computes, torch records an event there, to learn when the memory is
    free again; an event that became part of a recording could never be asked.
    What work on the host reads and writes has memory of its own, which recordings share: they are done
    again one after the other, and each from its beginning to its end.
    """

    def __init__(
        self, interruptions: Interruptions | None = None, tracer: Tracer = NULL_TRACER
    ) -> None:
        self._interruptions = interruptions or Interruptions()
        self._tracer = tracer
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._first: torch.cuda.CUDAGraph | None = None
        self._kept: dict[tuple[int, torch.Size, torch.dtype, torch.device], Tensor] = {}

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        steps: list[Callable[[], None]] = []
        with torch.cuda.stream(self._stream), _without_collections():
            self._record(work, steps)
        return lambda: _each(steps)

    def _record(self, work: Callable[[], None], steps: list[Callable[[], None]]) -> None:
        graph = self._begin()

        def interrupt(host: HostWork, asked: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            nonlocal graph
            values = self._keep(0, asked, torch.device("cpu"))
            kept = tuple(self._keep(i, x, x.device) for i, x in enumerate(tensors))
            self._end(graph, steps)
            steps.append(lambda: host(_when_written(values), *kept))
            graph = self._begin()
            return kept

        try:
            with self._interruptions.by(interrupt):
                work()
        except BaseException:
            with suppress(RuntimeError):  # what went wrong says more
                graph.capture_end()
            raise
        self._end(graph, steps)

    def _begin(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads go on copying weights meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        return graph

    def _end(self, graph: torch.cuda.CUDAGraph, steps: list[Callable[[], None]]) -> None:
        graph.capture_end()
        # A pool that no graph is left of cannot be used again.
        self._first = self._first or graph

        def launch() -> None:
            with self._tracer.span(Kind.GRAPH):
                graph.replay()

        steps.append(launch)

    def _keep(self, place: int, x: Tensor, device: torch.device) -> Tensor:
        """x where work on the host finds it each time; on a CPU pinned, and written by a kernel."""
        key = place, x.shape, x.dtype, device
        if key not in self._kept:
            pinned = device.type == "cpu"
            self._kept[key] = torch.empty(x.shape, dtype=x.dtype, device=device, pin_memory=pinned)
        kept = self._kept[key]
        if device.type == "cpu":
            from headrace.runtime.zero_copy import store

            store(x, kept)
        else:
            kept.copy_(x)
        return kept


@contextmanager
def _without_collections() -> Iterator[None]:
    """Graphs that are garbage would be destroyed by this thread, which must not do that meanwhile."""
    with _ONE_AT_A_TIME:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()


def _when_written(values: Tensor) -> list[Any]:
    """What a kernel that is queued writes to pinned memory."""
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    return list(values.tolist())


def _each(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()
