"""Host slots of a stage: memory for full KV pages that have no place on the device."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Self

import torch
from torch import Tensor

from headrace.runtime.memory.held import Holding, named
from headrace.runtime.streaming.tiers import AlignedBuffer, register, unregister
from headrace.scheduler.errors import StageError
from headrace.scheduler.memory import slot_bytes

OPTION = "--kv-host-memory"
"""What a user lowers when the host has no room for the slots."""

PIN_BYTES = 256 << 20
"""Pinned at a time. The first slots can be used long before the last ones, and the driver, which holds
up other calls meanwhile, is held for 0.15 s."""


class HostPages:
    """`count` slots in one buffer, each for one page of all of a stage's layers, one after the other.

    `page_bytes` has the layers in that order. A slot is rounded up to 4096 bytes and begins at a
    multiple of them. Where `device` is CUDA slots are pinned in the background, from the first one
    on, which takes 0.6 s per GB. Raises DoesNotFitError when the host has no such memory.
    """

    def __init__(
        self,
        page_bytes: Mapping[int, int],
        count: int,
        device: torch.device,
        pin_bytes: int = PIN_BYTES,
    ) -> None:
        assert count > 0
        self.page_bytes = tuple(page_bytes.values())
        self.slot_bytes = slot_bytes(sum(self.page_bytes))
        self._buffer = AlignedBuffer(count * self.slot_bytes, option=OPTION)
        self._slots = self._buffer.tensor.view(count, self.slot_bytes)
        self._parts = self._slots.split(max(1, pin_bytes // self.slot_bytes))
        self._ready: list[Future[None]] = [Future() for _ in self._parts]
        self._pinned: list[Tensor] = []
        self._error: Exception | None = None
        self._stopping = threading.Event()
        self._pinner: threading.Thread | None = None
        if device.type == "cuda":
            where = torch.cuda.current_device() if device.index is None else device.index
            self._pinner = threading.Thread(
                target=self._pin, args=(where,), name="headrace-kv-pin", daemon=True
            )
            self._pinner.start()
        else:
            for ready in self._ready:
                ready.set_result(None)

    @property
    def count(self) -> int:
        return len(self._slots)

    def slot(self, index: int) -> Tensor:
        """uint8 [slot_bytes], as soon as it is pinned where that is needed.

        Raises DoesNotFitError when it could not be, StageError when the stage closes before it is.
        """
        self._ready[index // len(self._parts[0])].result()
        return self._slots[index]

    def layers(self, index: int) -> tuple[Tensor, ...]:
        """What slot() gives, cut into the pages of the layers."""
        used = self.slot(index)[: sum(self.page_bytes)]
        return tuple(used.split(self.page_bytes))

    def pages(self, layer: int) -> Tensor:
        """All slots' pages of the layer-th of the layers, uint8 [count, page_bytes[layer]].

        Of slots that hold something: those that were written have been pinned.
        """
        start = sum(self.page_bytes[:layer])
        return self._slots[:, start : start + self.page_bytes[layer]]

    def check(self) -> None:
        """Raise the DoesNotFitError of slots that could not be pinned, if it is known by now."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Return when every slot can be used. Raises DoesNotFitError."""
        for ready in self._ready:
            ready.result()

    def _pin(self, device: int) -> None:
        done = 0
        try:
            torch.cuda.set_device(device)  # else a context is opened on device 0
            for part in self._parts:
                if self._stopping.is_set():
                    raise StageError("the stage was closed before its host slots were pinned")
                register(part, OPTION)
                self._pinned.append(part)
                self._ready[done].set_result(None)
                done += 1
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits for a slot
            self._error = error
            for ready in self._ready[done:]:
                ready.set_exception(error)

    def memory(self) -> Iterator[Holding]:
        return named("host_kv", [self._buffer.tensor])

    def stop(self) -> None:
        """Pin no more; whoever waits for a slot gets an error. Slots that are in use stay."""
        self._stopping.set()
        if self._pinner is not None:
            self._pinner.join()

    def close(self) -> None:
        """Unpin. Nothing copies any more."""
        self.stop()
        while self._pinned:
            unregister(self._pinned.pop())
        self._buffer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
