"""Whole blocks that somebody will ask for: read ahead, while that somebody is still being built."""

from typing import Self

import torch

from headrace.runtime.manifest import Block
from headrace.runtime.streaming.loads import Load, Storage, drain
from headrace.runtime.streaming.tiers import device_bytes


class BlockReads:
    """Reads blocks on the storage's threads; the storage stays the caller's and must outlive this."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._begun: dict[tuple[str, torch.device], tuple[torch.Tensor, Load]] = {}

    def begin(self, block: Block, device: torch.device) -> None:
        """Start reading the block into memory of `device`. Raises DoesNotFitError."""
        if block.nbytes and (block.name, device) not in self._begun:
            memory = device_bytes(block.nbytes, device)
            load = self._storage.load(block.file, block.data_offset, memory)
            self._begun[block.name, device] = memory, load

    def take(self, block: Block, device: torch.device) -> torch.Tensor:
        """The block's bytes (uint8) when they are there; from then on they are the caller's.

        The current stream waits for them. Raises StoreError when they cannot be read.
        """
        if not block.nbytes:
            return torch.empty(0, dtype=torch.uint8, device=device)
        self.begin(block, device)
        memory, load = self._begun[block.name, device]
        load.wait()
        del self._begun[block.name, device]
        return memory

    def close(self) -> None:
        """Let reads that nobody asked for end, and free their memory."""
        drain(load for _, load in self._begun.values())
        self._begun.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
