"""Hidden states between two layers, kept beside a conversion's journal, so that a killed one goes on there."""

import os
from pathlib import Path

import torch
from torch import Tensor

from headrace.runtime.block_file import sync_directory
from headrace.runtime.conversion.encoder import STATES
from headrace.scheduler.errors import StoreError


class StatesFile:
    """The newest states in a directory: those that the layer in the file's name is given."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def layer(self) -> int | None:
        """Whose input there is."""
        return max((int(file.stem.rpartition("-")[2]) for file in self._files()), default=None)

    def load(self, layer: int, values: Tensor) -> None:
        """Fills `values`. StoreError where the file is of another size."""
        file = self._file(layer)
        if file.stat().st_size != values.nbytes:
            raise StoreError(f"{file} is damaged: delete it, and earlier layers are run once more")
        with file.open("rb") as stream:
            for part in values:
                stream.readinto(_bytes(part))

    def save(self, layer: int, values: Tensor) -> None:
        """Durable, with its name, before the file of an earlier layer goes."""
        file = self._file(layer)
        partial = file.with_name(file.name + ".tmp")
        with partial.open("wb") as out:
            for part in values:
                out.write(_bytes(part))
            out.flush()
            os.fsync(out.fileno())
        partial.replace(file)
        sync_directory(self._directory)
        for other in self._files():
            if other != file:
                other.unlink()

    def remove(self) -> None:
        for file in self._files():
            file.unlink()

    def _files(self) -> list[Path]:
        return list(self._directory.glob(STATES))

    def _file(self, layer: int) -> Path:
        return self._directory / STATES.replace("*", f"{layer:05d}")


def _bytes(values: Tensor) -> memoryview:
    assert values.is_contiguous()
    data: memoryview = values.view(-1).view(torch.uint8).numpy().data
    return data
