"""Copies of weights from host RAM to the device, started in any order and waited for as loads."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

from headrace.runtime.streaming.loads import CopyStream, queued_work
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer
from headrace.scheduler.errors import HeadraceError, StoreError

Source = Callable[[], torch.Tensor]
"""Returns the bytes to be copied when they are in host RAM, or raises what kept them from it."""


class HostCopies:
    """Copies from host RAM into device memory: over PCIe on a stream of its own; to a CPU, by threads.

    A copy whose source is still on its way waits in a thread of its own, and holds up no other.
    """

    def __init__(self, device: torch.device, name: str, tracer: Tracer = NULL_TRACER) -> None:
        self._device = device
        self._tracer = tracer
        self._stream = CopyStream(device, tracer) if device.type == "cuda" else None
        self._here = ThreadPoolExecutor(1, f"headrace-{name}")
        self._coming = ThreadPoolExecutor(1, f"headrace-{name}-coming", self.enter_thread)

    @property
    def pinned(self) -> bool:
        """Whether sources have to be pinned for copies to run beside the host."""
        return self._stream is not None

    def enter_thread(self) -> None:
        """Once in a thread of ours, before it pins memory or copies."""
        if self._stream is not None:
            self._stream.enter_thread()

    def copy(self, source: Source, dest: torch.Tensor, *, here: bool) -> "Copy":
        """Start dest <- source(), on CUDA behind the current stream's work.

        `here` says that source() returns at once. Never raises: Copy.wait does.
        """
        after = queued_work(self._device)
        if not here:
            return Copy(self._device, self._coming.submit(self._run, source, dest, after))
        if after is None:
            return Copy(self._device, self._here.submit(self._run, source, dest, after))
        queued: Future[torch.cuda.Event | None] = Future()
        try:
            queued.set_result(self._run(source, dest, after))
        except Exception as error:  # noqa: BLE001 - raised again by Copy.wait
            queued.set_exception(error)
        return Copy(self._device, queued)

    def _run(
        self, source: Source, dest: torch.Tensor, after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        memory = source()
        if self._stream is not None:
            assert after is not None
            return self._stream.copy(dest, memory, after)
        with torch.inference_mode(), self._tracer.span(Kind.COPY, nbytes=dest.nbytes):
            dest.copy_(memory)
        return None

    def close(self) -> None:
        """Let copies end whose sources come or fail. The sources' memory may go afterwards."""
        self._here.shutdown()
        self._coming.shutdown()
        if self._stream is not None:
            self._stream.synchronize()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Copy:
    """A Load whose bytes come from host RAM."""

    def __init__(self, device: torch.device, queued: "Future[torch.cuda.Event | None]") -> None:
        self._device = device
        self._queued = queued

    def wait(self) -> None:
        try:
            event = self._queued.result()
        except HeadraceError:
            raise
        except Exception as error:
            raise StoreError(f"copying weights from host RAM failed: {error!r}") from error
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    @property
    def is_over(self) -> bool:
        """Whether the source is not read any more."""
        if not self._queued.done():
            return False
        event = None if self._queued.exception() else self._queued.result()
        return event is None or event.query()
