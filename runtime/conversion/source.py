"""Tensors of a checkpoint and the weights that they make up, before anything of them is read."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.runtime.conversion.part import Part
from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.scheduler.errors import StoreError

CHUNK_BYTES = 8 << 20


class TensorBytes(Protocol):
    """A tensor whose bytes come in pieces: as it lies in a file, or made of one that does."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...

    def chunks(self) -> Iterator[memoryview]: ...
    def read(self) -> bytes: ...
    def tensor(self) -> Tensor: ...
    def rows(self) -> Iterator[Tensor]: ...


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """`nbytes` bytes at `offset` of `file`, a tensor of this type and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in order, a bounded number at a time, never mapped into memory."""
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(self.offset)
                left = self.nbytes
                while left:
                    buffer = memoryview(bytearray(min(left, CHUNK_BYTES)))
                    yield buffer[: _fill(stream, buffer)]
                    left -= len(buffer)
                os.posix_fadvise(stream.fileno(), self.offset, self.nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise StoreError(f"cannot read {self.file}: {error.strerror}") from error

    def read(self) -> bytes:
        return b"".join(self.chunks())

    def tensor(self) -> Tensor:
        """All of it, in memory."""
        return torch.frombuffer(bytearray(self.read()), dtype=TORCH_DTYPES[self.dtype]).view(
            self.shape
        )

    def rows(self) -> Iterator[Tensor]:
        """Runs of whole rows as tensors [rows, columns]; each but the last has 64 n rows."""
        columns = self.shape[-1] if self.shape else 1
        row_bytes = max(self.nbytes // max(prod(self.shape[:-1]), 1), 1)
        step = rows_at_once(row_bytes)
        for first in range(0, self.nbytes, step * row_bytes):
            size = min(step * row_bytes, self.nbytes - first)
            part = SourceTensor(self.file, self.dtype, (), self.offset + first, size)
            flat = torch.frombuffer(bytearray(part.read()), dtype=TORCH_DTYPES[self.dtype])
            yield flat.reshape(-1, columns)


def rows_at_once(row_bytes: int) -> int:
    """64 n rows, of CHUNK_BYTES together where that is enough for 64."""
    return max(CHUNK_BYTES // row_bytes // 64, 1) * 64


def _fill(stream: Any, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer):
        count = stream.readinto(buffer[done:])
        if not count:
            raise StoreError(f"{stream.name} ended while it was read; is it being replaced?")
        done += count
    return done


Pieces = Callable[[], Iterator[tuple[str, Tensor]]]
"""(role, tensor) of a weight's parts in stored order, each run by run."""


@dataclass(frozen=True, slots=True)
class Repacking:
    """How another tool's tensors become a store's parts, with every value as it was."""

    parts: tuple[Part, ...]
    pieces: Pieces


@dataclass(frozen=True, slots=True)
class SourceWeight:
    """A logical weight of `shape` in one of a store's formats.

    `parts` are the checkpoint's tensors, stored as they are unless there is a `repacking`.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Part, TensorBytes], ...]
    state: Mapping[str, Any] | None = None
    repacking: Repacking | None = None

    @property
    def data(self) -> TensorBytes:
        return self.parts[0][1]

    @property
    def stored(self) -> tuple[Part, ...]:
        """The parts that a store holds of it when it is kept."""
        if self.repacking is not None:
            return self.repacking.parts
        return tuple(part for part, _ in self.parts)

    def stream(self) -> Iterator[tuple[str, memoryview]]:
        """(stored name, bytes) in stored order, a bounded number of bytes at a time."""
        if self.repacking is None:
            for part, tensor in self.parts:
                for chunk in tensor.chunks():
                    yield part.entry.name, chunk
            return
        names = {part.role: part.entry.name for part in self.repacking.parts}
        for role, piece in self.repacking.pieces():
            yield names[role], bytes_of(piece)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU."""
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


Tensors = Mapping[str, SourceTensor]


@dataclass(frozen=True, slots=True)
class Imported:
    """What a reader made of a checkpoint's tensors: weights, and the names that are used up by them."""

    weights: Sequence[SourceWeight]
    used: frozenset[str]


class AnyCheckpoint(Protocol):
    """What is converted: a directory of safetensors, or a GGUF file. `dtype` is the type of most of what is not
    quantized, `method` says how the rest is, `config` is a config.json."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def method(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def weights(self) -> Mapping[str, SourceWeight]: ...

    @property
    def has_tokenizer(self) -> bool: ...

    def companions(self) -> dict[str, bytes]:
        """Tokenizer, chat template and generation config: files that a store takes over, by name."""
        ...

    def fingerprint(self) -> str:
        """Tells this checkpoint from others without reading it whole."""
        ...
