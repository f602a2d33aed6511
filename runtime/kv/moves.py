"""Moves full KV pages beside the passes: device pages to host slots and back, host slots to a log and back,
and to slots on NVMe.

Why no byte is read too early or written too late. From the pass that brings a move until every stage
has reported it, the scheduler lets nothing else touch what the move writes, and nothing write what it
reads. So two things are left to a stage. A move has to see what was written before: of an OUT that is
what earlier passes computed, which may be in flight when the scheduler names the move. A stage runs
passes one after the other and begins the moves of one at its start. On a CPU all that earlier passes
wrote is in memory then, for computing is done when it returns, and the queue to the thread that copies
orders one after the other; on CUDA the copies are queued behind an event that the compute stream is
given then. All other sources were written by moves that had been reported. And a move must have ended
when it is reported: its last byte has arrived then (on CUDA an event after it has happened), or nothing
writes for it any more. What is computed from then on, in passes that come after the report, sees it.
"""

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple, Protocol, Self

import torch

from headrace.runtime.kv.copies import PageCopier
from headrace.runtime.kv.host import HostPages
from headrace.runtime.kv.store import KVStore
from headrace.runtime.kv.window import PageWindow
from headrace.runtime.streaming.loads import queued_work
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer
from headrace.scheduler.plan import MoveKind, PageMove

log = logging.getLogger(__name__)

LOG_THREADS = 4
"""Moves to and from a log that are under way at once."""


SINK_THREADS = 2
"""Pages that are written to slots on NVMe at once."""


class PageLog(Protocol):
    """Pages on NVMe by key. Several threads call it at once. What it raises loses the page."""

    def put(self, cohort: int, pages: Sequence[tuple[bytes, memoryview]]) -> Collection[bytes]:
        """Keep pages that will go together, if there is room; the keys of those that are kept."""

    def get(self, key: bytes, dest: memoryview) -> bool:
        """Fill `dest` with a page as it was put; False when it cannot be had."""


class Ended(NamedTuple):
    """Numbers of moves that ended, with their page and without it, and bytes that were moved."""

    moved: tuple[int, ...]
    lost: tuple[int, ...]
    out_bytes: int
    in_bytes: int


NONE_ENDED = Ended((), (), 0, 0)


class _Ledger:
    """Which moves are under way, and which have ended since they were last taken. Any thread asks."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._changed = threading.Condition()
        self._under_way: set[int] = set()
        self._closed = False
        self._clear()

    def _clear(self) -> None:
        self._moved: list[PageMove] = []
        self._lost: list[PageMove] = []

    def begin(self, moves: Sequence[PageMove]) -> None:
        with self._changed:
            for move in moves:
                assert move.number not in self._under_way, f"move {move.number} came twice"
                self._under_way.add(move.number)

    def end(self, move: PageMove, moved: bool) -> None:
        """The first time for a move is what counts."""
        with self._changed:
            if move.number in self._under_way:
                self._under_way.discard(move.number)
                (self._moved if moved else self._lost).append(move)
                self._changed.notify_all()

    def take(self) -> Ended:
        with self._changed:
            moved, lost = self._moved, self._lost
            self._clear()
        kinds = [move.kind for move in moved]
        return Ended(
            tuple(move.number for move in moved),
            tuple(move.number for move in lost),
            kinds.count(MoveKind.OUT) * self._page_bytes,
            kinds.count(MoveKind.IN) * self._page_bytes,
        )

    def wait(self, deadline: float) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._under_way, deadline)
            return not self._under_way

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _LogMoves:
    """SPILLs and FETCHes, on threads that wait for the drive."""

    def __init__(
        self,
        pages: PageLog,
        host: HostPages,
        ended: Callable[[PageMove, bool], None],
        tracer: Tracer,
    ) -> None:
        self._log, self._host, self._ended, self._tracer = pages, host, ended, tracer
        self._threads = ThreadPoolExecutor(LOG_THREADS, "headrace-kv-log")

    def begin(self, spills: Sequence[PageMove], fetches: Sequence[PageMove]) -> None:
        """Spills of a cohort are put together."""
        by_cohort = sorted(spills, key=lambda move: move.cohort)
        for cohort, some in groupby(by_cohort, lambda move: move.cohort):
            self._threads.submit(self._run, self._spill, cohort, list(some))
        for move in fetches:
            self._threads.submit(self._run, self._fetch, move.cohort, [move])

    def _run(
        self,
        work: Callable[[int, Sequence[PageMove]], Collection[bytes]],
        cohort: int,
        moves: Sequence[PageMove],
    ) -> None:
        """`work` returns the keys of the moves that succeeded."""
        kept: Collection[bytes] = ()
        nbytes, first = len(moves) * self._host.slot_bytes, moves[0]
        try:
            with self._tracer.span(Kind.KV_LOG, first.kind.value, first.number, nbytes):
                kept = work(cohort, moves)
        except Exception as error:  # noqa: BLE001 - a page that is lost is computed again
            log.warning("KV pages on NVMe (%s): %s", first.kind.value, error)
        for move in moves:
            self._ended(move, move.key in kept)

    def _spill(self, cohort: int, moves: Sequence[PageMove]) -> Collection[bytes]:
        return self._log.put(cohort, [(move.key, self._memory(move)) for move in moves])

    def _fetch(self, cohort: int, moves: Sequence[PageMove]) -> Collection[bytes]:
        (move,) = moves
        return (move.key,) if self._log.get(move.key, self._memory(move)) else ()

    def _memory(self, move: PageMove) -> memoryview:
        return self._host.slot(move.slot).numpy().data

    def close(self) -> None:
        """Let what is under way end; the rest is dropped."""
        self._threads.shutdown(cancel_futures=True)


class _WindowMoves:
    """SINKs, on threads that wait for the drive."""

    def __init__(
        self,
        window: PageWindow,
        host: HostPages,
        ended: Callable[[PageMove, bool], None],
        tracer: Tracer,
    ) -> None:
        self._window, self._host, self._ended, self._tracer = window, host, ended, tracer
        self._threads = ThreadPoolExecutor(SINK_THREADS, "headrace-kv-sink")

    def begin(self, moves: Sequence[PageMove]) -> None:
        for move in moves:
            self._threads.submit(self._run, move)

    def _run(self, move: PageMove) -> None:
        has_sunk, nbytes = False, self._window.page_size
        try:
            with self._tracer.span(Kind.KV_LOG, move.kind.value, move.number, nbytes):
                parts = [part.numpy().data for part in self._host.layers(move.slot)]
                has_sunk = self._window.write(move.nvme_slot, parts)
        except Exception as error:  # noqa: BLE001 - the page stays where it is
            log.warning("KV pages on NVMe (%s): %s", move.kind.value, error)
        self._ended(move, has_sunk)

    def close(self) -> None:
        """Let what is under way end; the rest is dropped."""
        self._threads.shutdown(cancel_futures=True)


class PageMover:
    """Carries out the moves of a stage, all of them beside what calls it; owns `host`, and neither `pages`
    nor `window`.

    A move whose page could not be had or kept is lost, and logged if an error is why. One thread
    begins moves and takes what has ended.
    """

    def __init__(
        self,
        kv: KVStore,
        host: HostPages,
        device: torch.device,
        pages: PageLog | None = None,
        tracer: Tracer = NULL_TRACER,
        window: PageWindow | None = None,
    ) -> None:
        self._device, self._host, self._tracer = device, host, tracer
        self._ledger = ledger = _Ledger(sum(host.page_bytes))
        self._copiers: Mapping[MoveKind, PageCopier] = {
            kind: PageCopier(kind, kv, host, device, ledger.end, tracer)
            for kind in (MoveKind.OUT, MoveKind.IN)
        }
        self._files: _LogMoves | None = None
        self._sinks: _WindowMoves | None = None
        self.attach(pages, window)
        self._closed = False

    def attach(self, pages: PageLog | None, window: PageWindow | None) -> None:
        """Have pages kept there from now on; none was before."""
        assert self._files is None and self._sinks is None
        ended = self._ledger.end
        if pages is not None:
            self._files = _LogMoves(pages, self._host, ended, self._tracer)
        if window is not None:
            self._sinks = _WindowMoves(window, self._host, ended, self._tracer)

    def begin(self, moves: Sequence[PageMove]) -> None:
        """Begin moves, an OUT behind the work that the current stream of the device holds by now."""
        assert not self._closed
        if not moves:
            return
        self._ledger.begin(moves)
        of = {kind: [move for move in moves if move.kind is kind] for kind in MoveKind}
        after = queued_work(self._device)
        for kind, copier in self._copiers.items():
            copier.begin(of[kind], after)
        if of[MoveKind.SPILL] or of[MoveKind.FETCH]:
            assert self._files is not None, "pages go to NVMe and the stage has no log for them"
            self._files.begin(of[MoveKind.SPILL], of[MoveKind.FETCH])
        if of[MoveKind.SINK]:
            assert self._sinks is not None, "pages go to slots on NVMe and the stage has none"
            self._sinks.begin(of[MoveKind.SINK])

    @property
    def host(self) -> HostPages:
        return self._host

    def take(self) -> Ended:
        """The moves that ended since the last call. DoesNotFitError: slots could not be pinned."""
        self._host.check()
        return self._ledger.take()

    def wait(self, deadline: float) -> bool:
        """Whether all moves have ended, after `deadline` seconds at the latest or when closed."""
        with self._tracer.span(Kind.KV_WAIT):
            return self._ledger.wait(deadline)

    def wait_host(self) -> None:
        """Return when every host slot can be used. Raises DoesNotFitError."""
        self._host.wait()

    def close(self) -> None:
        """Let what is being copied end, drop the rest, and free the slots. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._ledger.close()
        self._host.stop()
        for copier in self._copiers.values():
            copier.close()
        if self._files is not None:
            self._files.close()
        if self._sinks is not None:
            self._sinks.close()
        self._host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
