"""Copies of KV pages between the device and host slots: a thread for each direction, beside passes.

Weights come first on the link. A GPU's copy engine knows no priorities, it takes turns among streams
that have something queued. So little is queued of pages: two pieces of at most 4 MiB in a direction.
A weight that is to be loaded waits for no more than these (0.3 ms over PCIe 4), and while both are under
way, whole layers are queued in pieces of 16 MiB, of pages two times 4 MiB. Pages that leave go the other
way and meet no weights.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.runtime.kv.host import HostPages
from headrace.runtime.kv.store import KVStore
from headrace.runtime.trace import Kind, Tracer
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.plan import MoveKind, PageMove

log = logging.getLogger(__name__)

PIECE_BYTES = 4 << 20
"""At most so much is being copied while as much is queued behind it."""

Pairs = Iterable[tuple[Tensor, Tensor]]
"""Byte vectors of equal size: destination and source."""

Arrived = Callable[[], None]

Span = AbstractContextManager[None]


class Link(Protocol):
    """Copies one direction's bytes in order. One thread calls it."""

    def enter_thread(self) -> None:
        """Once, in that thread."""

    def follow(self, after: torch.cuda.Event | None) -> None:
        """Copy nothing more before `after` has happened."""

    def copy(self, pairs: Pairs, span: Span, arrived: Arrived) -> None:
        """Copy the pairs within `span`; `arrived` is called when all bytes are where they belong."""

    def drain(self) -> None:
        """Return when everything has arrived."""


class HostLink:
    """For a CPU, where copying is the thread's own work."""

    def enter_thread(self) -> None:
        pass

    def follow(self, after: torch.cuda.Event | None) -> None:
        assert after is None

    def copy(self, pairs: Pairs, span: Span, arrived: Arrived) -> None:
        with span:
            for dest, source in pairs:
                # Unlike torch's, on this thread alone: others compute.
                np.copyto(dest.numpy(), source.numpy())
        arrived()

    def drain(self) -> None:
        pass


class StreamLink:
    """For CUDA: a stream of its own, on which two pieces at most are queued."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pieces: deque[tuple[torch.cuda.Event, int, Arrived | None]] = deque()
        self._queued = 0

    def enter_thread(self) -> None:
        torch.cuda.set_device(self._stream.device)  # else a context is opened on device 0

    def follow(self, after: torch.cuda.Event | None) -> None:
        assert after is not None
        self._stream.wait_event(after)

    def copy(self, pairs: Pairs, span: Span, arrived: Arrived) -> None:
        nbytes = 0
        with torch.inference_mode(), torch.cuda.stream(self._stream), span:
            for dest, source in _small(pairs):
                if nbytes + source.nbytes > PIECE_BYTES:
                    self._end_piece(nbytes, None)
                    nbytes = 0
                dest.copy_(source, non_blocking=True)
                nbytes += source.nbytes
        self._end_piece(nbytes, arrived)

    def _end_piece(self, nbytes: int, arrived: Arrived | None) -> None:
        event = torch.cuda.Event(blocking=True)  # this thread sleeps meanwhile
        event.record(self._stream)
        self._pieces.append((event, nbytes, arrived))
        self._queued += nbytes
        while self._queued > PIECE_BYTES:
            self._await_oldest()

    def _await_oldest(self) -> None:
        event, nbytes, arrived = self._pieces.popleft()
        self._queued -= nbytes
        event.synchronize()
        if arrived is not None:
            arrived()

    def drain(self) -> None:
        while self._pieces:
            self._await_oldest()
        self._stream.synchronize()  # what a copy that failed had queued


def _small(pairs: Pairs) -> Pairs:
    """The pairs, cut where they are larger than a piece, which a layer's page hardly ever is."""
    for dest, source in pairs:
        if source.nbytes <= PIECE_BYTES:
            yield dest, source
        else:
            yield from zip(dest.split(PIECE_BYTES), source.split(PIECE_BYTES), strict=True)


def make_link(device: torch.device) -> Link:
    return StreamLink(device) if device.type == "cuda" else HostLink()


class PageCopier:
    """Does the OUTs or the INs of a stage, on a thread of its own, in the order of asking.

    `ended` is called from there for each move that was begun: whether its page has arrived. Nothing
    is written for it from then on.
    """

    def __init__(
        self,
        kind: MoveKind,
        kv: KVStore,
        host: HostPages,
        device: torch.device,
        ended: Callable[[PageMove, bool], None],
        tracer: Tracer,
    ) -> None:
        self._outwards = kind is MoveKind.OUT
        self._pages = [kv.pages(layer) for layer in kv.layers]
        self._host, self._ended, self._tracer = host, ended, tracer
        self._link = make_link(device)
        self._closed = threading.Event()
        name = f"headrace-kv-{kind.value}"
        self._thread = ThreadPoolExecutor(1, name, self._link.enter_thread)

    def begin(self, moves: Sequence[PageMove], after: torch.cuda.Event | None) -> None:
        """Begin them behind `after`. Costs the caller next to nothing."""
        if moves:
            self._thread.submit(self._run, moves, after)

    def _run(self, moves: Sequence[PageMove], after: torch.cuda.Event | None) -> None:
        try:
            self._link.follow(after)
            for move in moves:
                if self._closed.is_set():
                    break
                self._copy(move)
            self._link.drain()
        except Exception as error:  # noqa: BLE001 - a page that is lost is computed again
            if not isinstance(error, HeadraceError):  # that of the slots, which fails passes
                log.warning("moving KV pages (%s): %s", moves[0].kind.value, error)
            with suppress(Exception):
                self._link.drain()  # what was queued would arrive in pages that are others' by then
        for move in moves:  # those that arrived ended then
            self._ended(move, False)

    def _copy(self, move: PageMove) -> None:
        slot = self._host.layers(move.slot)
        page = [pages[move.page] for pages in self._pages]
        pairs = zip(slot, page, strict=True) if self._outwards else zip(page, slot, strict=True)
        nbytes = sum(self._host.page_bytes)
        span = self._tracer.span(Kind.KV_COPY, move.kind.value, move.number, nbytes)
        self._link.copy(pairs, span, lambda: self._ended(move, True))

    def close(self) -> None:
        """Let the move under way end; the others are dropped. The memory may go afterwards."""
        self._closed.set()
        self._thread.shutdown()
