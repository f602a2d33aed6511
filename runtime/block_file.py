"""One block of a store: a safetensors file whose data section is one aligned extent."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Self

import xxhash

from headrace.runtime.manifest import ALIGN_BLOCK, ALIGN_TENSOR, TensorSpec
from headrace.scheduler.errors import StoreError

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by safetensors' name of the type."""

# transformers ignores checkpoint tensors so named (buffers of old checkpoints), so that pads do not
# show up as unexpected weights when a store is opened with from_pretrained.
PAD_NAME = "pad.{}.rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be stored: its name, type (safetensors' name) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies: `header` ends where the data section of `nbytes` bytes starts."""

    header: bytes
    nbytes: int
    tensors: dict[str, TensorSpec]

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.nbytes


def _up(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def lay_out(entries: Iterable[Entry]) -> Layout:
    """Places tensors in the given order, each 256-byte aligned, and writes the padded header."""
    tensors: dict[str, TensorSpec] = {}
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = pads = 0

    def place(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        nonlocal offset
        described[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes

    def pad(alignment: int) -> None:
        nonlocal pads
        gap = _up(offset, alignment) - offset
        if gap:
            place(PAD_NAME.format(pads), "U8", (gap,), gap)
            pads += 1

    for entry in entries:
        pad(ALIGN_TENSOR)
        assert entry.name not in tensors, entry.name
        tensors[entry.name] = TensorSpec(entry.dtype, entry.shape, offset, entry.nbytes)
        place(entry.name, entry.dtype, entry.shape, entry.nbytes)
    pad(ALIGN_BLOCK)
    return Layout(_header(described), offset, tensors)


def _header(described: dict[str, object]) -> bytes:
    """safetensors' header: u64 length, then JSON, here followed by spaces up to the alignment."""
    text = json.dumps(described, separators=(",", ":")).encode()
    length = _up(8 + len(text), ALIGN_BLOCK) - 8
    return length.to_bytes(8, "little") + text.ljust(length)


@dataclass(frozen=True, slots=True)
class Written:
    """Hashes (xxh3_64, hexadecimal) of a finished block file's header and data section."""

    header_hash: str
    data_hash: str


class BlockWriter:
    """Fills the data section of one block file in the layout's order.

    The bytes go to `<file>.tmp`; `finish` makes them durable and gives the file its name, so a file
    with its final name is always whole. Leaving the context unfinished removes what was written.
    """

    def __init__(self, file: Path, layout: Layout) -> None:
        self._file = file
        self._layout = layout
        self._partial = file.with_name(file.name + ".tmp")
        self._hash = xxhash.xxh3_64()
        self._position = 0
        self._out: IO[bytes] | None = self._partial.open("wb")

    def __enter__(self) -> Self:
        self._stream.write(self._layout.header)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _stream(self) -> IO[bytes]:
        assert self._out is not None, "the block is finished"
        return self._out

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Appends bytes to tensor `name`; tensors come in the layout's order."""
        spec = self._layout.tensors[name]
        if self._position < spec.offset:
            self._append(bytes(spec.offset - self._position))
        self._append(data)
        assert spec.offset < self._position <= spec.offset + spec.nbytes or not spec.nbytes, name

    def _append(self, data: bytes | bytearray | memoryview) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self._position += len(data)

    def finish(self) -> Written:
        self._append(bytes(self._layout.nbytes - self._position))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._out = None
        self._partial.replace(self._file)
        sync_directory(self._file.parent)
        return Written(xxhash.xxh3_64_hexdigest(self._layout.header), self._hash.hexdigest())

    def close(self) -> None:
        """Drops an unfinished file. Its buffer may not fit the disk any more, which is no news here."""
        if self._out is None:
            return
        out, self._out = self._out, None
        try:
            out.close()
        except OSError:
            out.close()
        finally:
            self._partial.unlink(missing_ok=True)


def write_durably(file: Path, data: bytes) -> None:
    """Replaces `file` atomically: it holds either what it held or all of `data`."""
    partial = file.with_name(file.name + ".tmp")
    with partial.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)
    sync_directory(file.parent)


def sync_directory(path: Path) -> None:
    """Makes renames in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_header(file: Path) -> tuple[dict[str, TensorSpec], int]:
    """A safetensors file's tensors (offsets relative to its data section) and where that starts.

    Raises StoreError when the file is missing, not safetensors, or shorter than its tensors.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            if not 2 <= length <= size - 8:
                raise StoreError(
                    f"{file} is damaged or no safetensors file: its header should have {length} "
                    f"bytes, the whole file has {size}; download it again"
                )
            described = json.loads(stream.read(length))
            described.pop("__metadata__", None)
            tensors = {name: _parse(entry) for name, entry in described.items()}
    except OSError as error:
        raise StoreError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{file} is damaged or no safetensors file: its header cannot be read ({error}); "
            "download it again"
        ) from error
    end = 8 + length + max((spec.offset + spec.nbytes for spec in tensors.values()), default=0)
    if end > size:
        raise StoreError(
            f"{file} is truncated: its header promises {end} bytes, it has {size}; download it again"
        )
    return tensors, 8 + length


def _parse(entry: dict[str, object]) -> TensorSpec:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    assert isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)
    spec = TensorSpec(dtype, tuple(shape), offsets[0], offsets[1] - offsets[0])
    if prod(spec.shape) * DTYPE_BYTES[dtype] != spec.nbytes:
        raise ValueError(f"a {dtype} tensor of shape {spec.shape} in {spec.nbytes} bytes")
    return spec
