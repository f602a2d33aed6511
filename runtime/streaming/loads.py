"""What a load is: bytes on their way into memory that somebody will compute on."""

import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

from headrace.runtime.manifest import ALIGN_BLOCK
from headrace.runtime.memory.held import Holding
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer
from headrace.scheduler.errors import HeadraceError, StoreError


class Load(Protocol):
    """Bytes on their way into `dest`."""

    def wait(self) -> None:
        """Return when the caller may use `dest`; may be called again.

        CPU: every byte is in `dest`. CUDA: every copy is queued, and torch.cuda.current_stream()
        waits for the last one. Raises StoreError, naming the file, when nothing writes to `dest`
        any more; on CUDA, when nothing does that the current stream does not wait for.
        """


class Storage(Protocol):
    """Reads extents of files into host or device memory, asynchronously and in order of asking."""

    @property
    def name(self) -> str: ...

    def load(self, file: Path, offset: int, dest: torch.Tensor) -> Load:
        """Start reading dest.nbytes bytes from `offset` on; both are multiples of 4096.

        `dest` is a contiguous uint8 vector on the CPU or on CUDA. On CUDA it is overwritten only
        after the work that the caller's current stream holds at this moment, so a slot may be
        given back while kernels that read it are still queued. Never raises for what is wrong
        with the file: `Load.wait` does.
        """

    def memory(self) -> Iterable[Holding]:
        """What is held to read with, as far as it is known."""

    def close(self) -> None:
        """Let running reads end, fail the waiting ones, free threads, files and buffers."""


def drain(loads: Iterable[Load]) -> None:
    """Wait for loads whose bytes nobody wants any more, and whose memory somebody does."""
    for load in loads:
        with suppress(HeadraceError):
            load.wait()


def check_extent(offset: int, dest: torch.Tensor) -> None:
    """Assert what Storage.load asks of its caller."""
    assert dest.dtype == torch.uint8
    assert dest.dim() == 1
    assert dest.is_contiguous()
    assert dest.nbytes > 0
    assert offset % ALIGN_BLOCK == 0 and dest.nbytes % ALIGN_BLOCK == 0, (offset, dest.nbytes)


def too_short(file: Path, end: int, expected: int) -> StoreError:
    """The error for a file that ends at byte `end` instead of `expected` or later."""
    return StoreError(
        f"{file}: ends at byte {end}, expected at least {expected}; the store is damaged or "
        "incomplete: convert the checkpoint again"
    )


def queued_work(device: torch.device) -> torch.cuda.Event | None:
    """An event that fires when what `device`'s current stream holds now is done; None on a CPU."""
    if device.type != "cuda":
        return None
    # Blocking: a host thread that waits for it sleeps instead of burning a core.
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


PIECE_BYTES = 16 << 20
"""Bytes of a piece. Copies to the device are queued in pieces, so that small ones of other streams, such as
a pass's positions, wait for a piece (0.3 ms over PCIe 5) and not for a layer: in a trace of two H200s each
pass's first layer began 17 ms late, at the end of the second layer's copy after its start."""


class CopyStream:
    """A CUDA stream of its own for copies into device memory; any thread may call any method."""

    def __init__(self, device: torch.device, tracer: Tracer = NULL_TRACER) -> None:
        self._stream = torch.cuda.Stream(device)
        self._tracer = tracer

    def enter_thread(self) -> None:
        """Once in a thread of ours: else its first CUDA call would open a context on device 0."""
        torch.cuda.set_device(self._stream.device)

    def copy(
        self, dest: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event
    ) -> torch.cuda.Event:
        """Queue dest <- source (bytes) behind `after`; the result fires when they have arrived."""
        # Inference mode: the only mode in which tensors made inside and outside of it may be written.
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            with self._tracer.span(Kind.COPY, nbytes=dest.nbytes):
                pieces = zip(dest.split(PIECE_BYTES), source.split(PIECE_BYTES), strict=True)
                for to, piece in pieces:
                    to.copy_(piece, non_blocking=True)
        return self.mark()

    def mark(self) -> torch.cuda.Event:
        """An event that fires when every copy queued so far is done."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event

    def synchronize(self) -> None:
        self._stream.synchronize()


class PendingLoad:
    """A load in `parts` that several threads finish in any order.

    It is over only when every part is, also when one failed: whoever waits may then free `dest`.
    """

    def __init__(
        self, file: Path, dest: torch.Tensor, parts: int, copies: CopyStream | None
    ) -> None:
        self.after = queued_work(dest.device)
        self._file = file
        self._device = dest.device
        self._copies = copies if dest.is_cuda else None
        self._parts = parts
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._error: HeadraceError | None = None
        self._ready: torch.cuda.Event | None = None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def fail(self, error: Exception) -> None:
        """Remember the first error; the part that met it must still be finished."""
        with self._lock:
            if self._error is None:
                self._error = (
                    error
                    if isinstance(error, HeadraceError)
                    else StoreError(f"{self._file}: loading failed: {error!r}")
                )

    def finish_part(self) -> None:
        with self._lock:
            self._parts -= 1
            assert self._parts >= 0
            if self._parts:
                return
        try:
            # Each part queued its copies before it was finished, so a mark now covers them all.
            self._ready = self._copies.mark() if self._copies else None
        except RuntimeError as error:
            self.fail(error)
        self._over.set()

    def wait(self) -> None:
        self._over.wait()
        # Also when a part failed: the copies of the others may still be under way.
        if self._ready is not None:
            torch.cuda.current_stream(self._device).wait_event(self._ready)
        if self._error is not None:
            raise self._error
