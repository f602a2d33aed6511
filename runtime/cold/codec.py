"""Chunks as objects of a cold tier: as they are, compressed, or as the difference from another chunk.

An object is MAGIC, the length of its header (u32, little-endian), the header in msgpack, and a payload:

    raw     the bytes
    zstd    the bytes, compressed
    planes  all first bytes of a run's elements, then all second ones, ...; compressed. Exponents of
            16-bit weights are alike, their mantissas are not: apart, the former compress
    delta   a bit for each element that differs from the base chunk's, then the differing elements
            XOR the base's, in planes; compressed. A few per cent of changed weights take little more
            than their own bytes, where they are

Nothing here is trusted: whoever decodes compares the hash of what comes out with the one it wants.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import zstandard

from headrace.runtime.cold.chunks import Run
from headrace.runtime.decoders import decoder

Data = bytes | bytearray | memoryview
Elements = np.ndarray[Any, np.dtype[Any]]

MAGIC = b"HRC1"
MOST_HEADER = 1 << 20
LEVEL = 1
"""zstd's. Higher ones were measured on planes of bf16 weights: slower, and larger."""

PAYS = 0.95
"""What is compressed to more than this share is stored as it is: reading it costs nothing then."""


class DamagedObjectError(ValueError):
    """An object's bytes are not what `encode` makes."""


@dataclass(frozen=True, slots=True)
class Header:
    encoding: str
    nbytes: int
    runs: tuple[Run, ...]


def encode(data: Data, runs: Sequence[Run]) -> bytes:
    """The object of a chunk that needs no other."""
    planes = any(width > 1 for width, _ in runs)
    payload = _compressed(_to_planes(data, runs) if planes else data)
    if len(payload) > PAYS * len(data):
        return _object("raw", data, runs, data)
    return _object("planes" if planes else "zstd", data, runs, payload)


def encode_delta(data: Data, base: Data, runs: Sequence[Run]) -> bytes:
    """The object of a chunk whose reader has `base`, of as many bytes."""
    masks, values = [], []
    for ours, theirs in zip(_elements(data, runs), _elements(base, runs), strict=True):
        difference = ours ^ theirs
        differs = difference != 0
        masks.append(np.packbits(differs).tobytes())
        values.append(_planes(difference[differs]))
    return _object("delta", data, runs, _compressed(b"".join([*masks, *values])))


def decode(stored: bytes, nbytes: int, base: Data | None = None) -> Data:
    """The `nbytes` bytes of a chunk. DamagedObjectError where that cannot be, or a base is lacking."""
    header, payload = _open(stored)
    if header.nbytes != nbytes or sum(n for _, n in header.runs) != nbytes:
        raise DamagedObjectError(f"it is of {header.nbytes} bytes, not {nbytes}")
    if any(width not in (1, 2, 4, 8) or n % width or n < 0 for width, n in header.runs):
        raise DamagedObjectError("its header names elements that there are not")
    match header.encoding:
        case "raw" if len(payload) == nbytes:
            return payload
        case "zstd":
            return _decompressed(payload, nbytes)
        case "planes":
            return _from_planes(_decompressed(payload, nbytes), header.runs)
        case "delta" if base is not None and len(base) == nbytes:
            return _from_delta(
                _decompressed(payload, 2 * nbytes + len(header.runs)), base, header.runs
            )
    raise DamagedObjectError(f"{header.encoding!r} with {len(payload)} bytes cannot be read")


def _object(encoding: str, data: Data, runs: Sequence[Run], payload: Data) -> bytes:
    header = msgspec.msgpack.encode(Header(encoding, len(data), tuple(runs)))
    return b"".join([MAGIC, len(header).to_bytes(4, "little"), header, payload])


def _open(stored: bytes) -> tuple[Header, memoryview]:
    start = len(MAGIC) + 4
    length = int.from_bytes(stored[len(MAGIC) : start], "little")
    if stored[: len(MAGIC)] != MAGIC or length > min(MOST_HEADER, len(stored) - start):
        raise DamagedObjectError("it does not begin as objects do")
    view = memoryview(stored)
    try:
        header = decoder(Header).decode(view[start : start + length])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedObjectError(f"its header cannot be read ({error})") from error
    return header, view[start + length :]


def _compressed(data: Data) -> bytes:
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=False).compress(data)


def _decompressed(payload: Data, most: int) -> bytes:
    """No more than `most` bytes, whatever a damaged frame says of itself."""
    try:
        size = zstandard.get_frame_parameters(payload).content_size
        if size > most:
            raise DamagedObjectError(f"it would be {size} bytes when decompressed")
        return zstandard.ZstdDecompressor().decompress(payload)
    except zstandard.ZstdError as error:
        raise DamagedObjectError(f"it cannot be decompressed ({error})") from error


def _slices(data: Data, runs: Sequence[Run]) -> Iterator[tuple[int, memoryview]]:
    view, start = memoryview(data), 0
    for width, nbytes in runs:
        yield width, view[start : start + nbytes]
        start += nbytes


def _elements(data: Data, runs: Sequence[Run]) -> Iterator[Elements]:
    for width, view in _slices(data, runs):
        yield np.frombuffer(view, f"u{width}")


def _planes(elements: Elements) -> bytes:
    if elements.itemsize == 1:
        return elements.tobytes()
    return elements.view(np.uint8).reshape(-1, elements.itemsize).T.tobytes()


def _to_planes(data: Data, runs: Sequence[Run]) -> bytes:
    return b"".join(map(_planes, _elements(data, runs)))


def _from_planes(planes: bytes, runs: Sequence[Run]) -> bytes:
    if len(planes) != sum(n for _, n in runs):
        raise DamagedObjectError("its planes have another size than its elements")
    return b"".join(_woven(view, width) for width, view in _slices(planes, runs))


def _woven(planes: memoryview, width: int) -> memoryview:
    """Elements of `width` bytes from their planes. Plane by plane: 7 times as fast as to transpose."""
    apart = np.frombuffer(planes, np.uint8).reshape(width, -1)
    woven = np.empty((apart.shape[1], width), np.uint8)
    for i in range(width):
        woven[:, i] = apart[i]
    return woven.reshape(-1).data


def _from_delta(unpacked: bytes, base: Data, runs: Sequence[Run]) -> bytearray:
    result, start = bytearray(base), 0
    masks = []
    for width, nbytes in runs:
        count = nbytes // width
        packed = np.frombuffer(unpacked[start : start + -(-count // 8)], np.uint8)
        if len(packed) != -(-count // 8):
            raise DamagedObjectError("its bits of differing elements end too soon")
        masks.append(np.unpackbits(packed, count=count).astype(bool))
        start += len(packed)
    for mask, (width, view) in zip(masks, _slices(result, runs), strict=True):
        nbytes = int(mask.sum()) * width
        if start + nbytes > len(unpacked):
            raise DamagedObjectError("its differing elements end too soon")
        woven = _woven(memoryview(unpacked)[start : start + nbytes], width)
        np.frombuffer(view, f"u{width}")[mask] ^= np.frombuffer(woven, f"u{width}")
        start += nbytes
    return result
