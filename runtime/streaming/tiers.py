"""Memory that weights rest in: aligned and pinned host buffers, the device's ring, the host tier."""

import mmap
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Self

import torch

from headrace.runtime.manifest import ALIGN_BLOCK, Block
from headrace.runtime.memory.held import Holding, named
from headrace.runtime.streaming.copies import HostCopies
from headrace.runtime.streaming.loads import Load, Storage
from headrace.runtime.trace import NULL_TRACER, Tracer
from headrace.scheduler.errors import DoesNotFitError, StoreError


class AlignedBuffer:
    """Page-aligned host memory of exactly `nbytes`, seen as the uint8 vector `tensor`.

    `pinned` registers it with CUDA, so that copies from it run beside the host; that costs about
    0.6 s per GB. torch's own pinned memory is rounded up to a power of two and not page-aligned.
    The memory goes back when the buffer and every view of `tensor` are gone; close() unpins it.
    Raises DoesNotFitError when the host has no such memory or may not lock it; `option` is what the
    user may lower.
    """

    def __init__(self, nbytes: int, *, pinned: bool = False, option: str = "--host-memory") -> None:
        assert nbytes > 0
        try:
            pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise DoesNotFitError(
                f"the host has no {nbytes} bytes of memory to give ({error}); lower {option}"
            ) from error
        with suppress(OSError):  # a kernel without huge pages: slower page faults, nothing else
            pages.madvise(mmap.MADV_HUGEPAGE)
        # A child process would copy pinned pages on fork: none of ours needs them.
        pages.madvise(mmap.MADV_DONTFORK)
        self.tensor = torch.frombuffer(pages, dtype=torch.uint8)
        self._pinned = False
        if pinned:
            register(self.tensor, option)
            self._pinned = True

    def close(self) -> None:
        if self._pinned:
            self._pinned = False
            unregister(self.tensor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def register(memory: torch.Tensor, option: str = "--host-memory") -> None:
    """Pin host memory for CUDA. Flags 0: with unified addressing it is pinned for every device."""
    result = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if result:
        raise DoesNotFitError(
            f"CUDA could not pin {memory.nbytes} bytes of host memory (cudaError {result}); lower "
            f"{option}, or raise the locked-memory limit (ulimit -l)"
        )


def unregister(memory: torch.Tensor) -> None:
    result = int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))
    assert not result, f"cudaHostUnregister: cudaError {result}"


def device_bytes(nbytes: int, device: torch.device) -> torch.Tensor:
    """A uint8 vector on the device; page-aligned on a CPU, so that O_DIRECT reads land in it."""
    if device.type == "cpu":
        return AlignedBuffer(nbytes).tensor
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.cuda.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise DoesNotFitError(
            f"{device} has {free} of {total} bytes free, {nbytes} more are needed; lower "
            "--device-memory"
        ) from error


class DeviceRing:
    """`slots` equal slots in one allocation; streamed layers pass through them in turn."""

    def __init__(self, slots: int, slot_bytes: int, device: torch.device) -> None:
        assert slots > 0
        assert slot_bytes > 0
        assert slot_bytes % ALIGN_BLOCK == 0, slot_bytes
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._bytes = device_bytes(slots * slot_bytes, device).view(slots, slot_bytes)

    @property
    def memory(self) -> torch.Tensor:
        """All slots, uint8 [slots, slot_bytes]."""
        return self._bytes

    def slot(self, index: int, nbytes: int) -> torch.Tensor:
        """The first `nbytes` bytes of a slot."""
        assert nbytes <= self.slot_bytes, (nbytes, self.slot_bytes)
        return self._bytes[index, :nbytes]


class HostTier:
    """Copies of layers in host RAM, pinned where the device is CUDA, filled by a background thread.

    A layer may be asked for before it is there; its load then waits for it. Reading and pinning
    overlap: while one layer is read, the next one's memory is registered.
    """

    def __init__(
        self,
        blocks: Mapping[int, Block],
        storage: Storage,
        device: torch.device,
        tracer: Tracer = NULL_TRACER,
    ) -> None:
        self._blocks = dict(blocks)
        self._storage = storage
        self._copies = HostCopies(device, "host-tier", tracer)
        self._buffers: list[AlignedBuffer] = []
        self._layers: dict[int, Future[torch.Tensor]] = {layer: Future() for layer in blocks}
        self._stopping = threading.Event()
        self._filler = threading.Thread(target=self._fill, name="headrace-fill", daemon=True)
        self._filler.start()

    def load(self, layer: int, dest: torch.Tensor) -> Load:
        """Copy a layer into `dest` of its exact size; on CUDA behind the current stream's work."""
        source = self._layers[layer]
        assert dest.nbytes == self._blocks[layer].nbytes
        return self._copies.copy(source.result, dest, here=source.done())

    def wait(self) -> None:
        """Return when every layer is in host RAM. Raises StoreError or DoesNotFitError."""
        for layer in self._layers.values():
            layer.result()

    def memory(self) -> Iterator[Holding]:
        """What is held."""
        return named("host_layers", [buffer.tensor for buffer in self._buffers])

    def _fill(self) -> None:
        waiting = dict(self._layers)
        try:
            self._copies.enter_thread()
            for layer, buffer, load in self._read_ahead():
                load.wait()
                waiting.pop(layer).set_result(buffer)
        except Exception as error:  # noqa: BLE001 - raised again by each load
            for future in waiting.values():
                future.set_exception(error)

    def _read_ahead(self) -> Iterator[tuple[int, torch.Tensor, Load]]:
        """Each layer's buffer and load, one layer behind the one that is being read."""
        reading: tuple[int, torch.Tensor, Load] | None = None
        for layer, block in self._blocks.items():
            if self._stopping.is_set():
                raise StoreError(f"{block.file}: not read, the host tier is closed")
            buffer = AlignedBuffer(block.nbytes, pinned=self._copies.pinned)
            self._buffers.append(buffer)
            following = self._storage.load(block.file, block.data_offset, buffer.tensor)
            if reading is not None:
                yield reading
            reading = layer, buffer.tensor, following
        if reading is not None:
            yield reading

    def close(self) -> None:
        """Stop filling, let queued copies end and unpin. Loads that have not started fail."""
        self._stopping.set()
        self._filler.join()
        self._copies.close()
        while self._buffers:
            self._buffers.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
