"""A storage that is late, and spoils at once what it will overwrite."""

import random
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from headrace.runtime.memory.held import Holding
from headrace.runtime.streaming.loads import Load, Storage


class SlowLoad:
    """A load that is over only after a delay."""

    def __init__(self, load: Load, seconds: float) -> None:
        self._load = load
        self._over = time.monotonic() + seconds

    def wait(self) -> None:
        time.sleep(max(0.0, self._over - time.monotonic()))
        self._load.wait()


class SlowStorage:
    """A real storage whose loads are over after random delays. `begun` has the files' names and
    `extents` the bytes asked for, in order."""

    name = "slow"

    def __init__(self, storage: Storage, seed: int) -> None:
        self._storage = storage
        self._random = random.Random(seed)
        self.begun: list[str] = []
        self.extents: list[tuple[Path, int, int]] = []

    def load(self, file: Path, offset: int, dest: torch.Tensor) -> Load:
        self.begun.append(file.name)
        self.extents.append((file, offset, dest.nbytes))
        dest.fill_(0xEE)  # whoever still reads this slot would see it
        return SlowLoad(self._storage.load(file, offset, dest), self._random.random() * 0.004)

    def memory(self) -> Iterable[Holding]:
        return self._storage.memory()

    def close(self) -> None:
        self._storage.close()
