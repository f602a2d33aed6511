"""A model's layers one after the other, each in device memory while the next one is on its way."""

from collections.abc import Generator
from typing import Protocol, Self

import torch
from torch import Tensor

from headrace.runtime.manifest import Block
from headrace.runtime.store import Store
from headrace.runtime.streaming.copies import HostCopies
from headrace.runtime.streaming.loads import Load, drain
from headrace.runtime.streaming.storage import choose_storage
from headrace.runtime.streaming.tiers import DeviceRing
from headrace.runtime.sweep.room import RING_SLOTS
from headrace.runtime.sweep.source import CheckpointModel, SweptModel


class Reader(Protocol):
    """Starts reading whole blocks into device memory."""

    def load(self, block: Block, dest: Tensor) -> Load: ...

    def close(self) -> None: ...


class StoreReader:
    """By the fastest way that the store's files can be read."""

    def __init__(self, store: Store, device: torch.device, storage: str) -> None:
        sample = max(store.layers, key=lambda block: block.nbytes)
        streamed = sum(block.nbytes for block in store.layers)
        self._storage = choose_storage(
            device,
            sample.file,
            sample.data_offset,
            sample.nbytes,
            storage,
            streamed_bytes=streamed,
        )

    def load(self, block: Block, dest: Tensor) -> Load:
        return self._storage.load(block.file, block.data_offset, dest)

    def close(self) -> None:
        self._storage.close()


class CheckpointReader:
    """By a thread that puts blocks together."""

    def __init__(self, model: CheckpointModel, device: torch.device) -> None:
        self._model = model
        self._copies = HostCopies(device, "sweep")

    def load(self, block: Block, dest: Tensor) -> Load:
        def read() -> Tensor:
            return torch.frombuffer(self._model.read_block(block), dtype=torch.uint8)

        return self._copies.copy(read, dest, here=False)

    def close(self) -> None:
        self._copies.close()


def reader_of(model: SweptModel, device: torch.device, storage: str) -> Reader:
    """Raises HeadraceError when a requested `storage` cannot be had."""
    if isinstance(model, Store):
        return StoreReader(model, device, storage)
    return CheckpointReader(model, device)


class LayerFeed:
    """Slots for two layers, and who fills them."""

    def __init__(self, model: SweptModel, device: torch.device, storage: str) -> None:
        self._layers = model.layers
        self._ring = DeviceRing(RING_SLOTS, max(block.nbytes for block in model.layers), device)
        self._reader = reader_of(model, device, storage)

    def blocks(self, first: int = 0) -> Generator[tuple[int, Tensor], None, None]:
        """Each layer's index, from `first` on, and its bytes on the device, for the current stream, until the
        next one is asked for.

        Raises StoreError when a layer cannot be read.
        """
        coming: Load | None = None
        try:
            coming = self._start(first) if first < len(self._layers) else None
            for index in range(first, len(self._layers)):
                assert coming is not None
                coming.wait()
                coming = self._start(index + 1) if index + 1 < len(self._layers) else None
                yield index, self._ring.slot(index % RING_SLOTS, self._layers[index].nbytes)
        finally:
            if coming is not None:
                drain([coming])

    def _start(self, index: int) -> Load:
        block = self._layers[index]
        return self._reader.load(block, self._ring.slot(index % RING_SLOTS, block.nbytes))

    def close(self) -> None:
        """Safe to call twice."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
