"""What a segment of the KV log looks like on disk.

    segment = one block of 4 KiB: who wrote it, for whom, how it is encrypted
              extents: records one after the other, padded with zeros to whole blocks
              a footer once nothing more is added: where its records are, padded to whole blocks

A record is a head of 112 bytes and the page, followed by a tag of 16 bytes where it is encrypted.
Every part starts with a magic and carries xxh3_64 checksums; fields are msgpack. Checksums are of
the bytes as they are stored, so that damage shows without a key, and says nothing about the page.
"""

import hashlib
import re
import struct
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Self, TypeVar

import msgspec
import xxhash

from headrace.runtime.decoders import decoder

BLOCK = 4096
"""Bytes; offsets and sizes of direct reads and writes are multiples of it."""

HEAD_BYTES = 112
TAG_BYTES = 16
KEY_BYTES = 16
VERSION = 1

_SEGMENT_MAGIC = b"HRKVSEG\0"
_RECORD_MAGIC = b"HRKV"
_FOOTER_MAGIC = b"HRKVEND\0"
_SEGMENT = struct.Struct("<8sHHQ")  # magic, version, bytes of the body, their xxh3
_RECORD = struct.Struct("<4sHHQQ")  # magic, version, bytes of the body, xxh3 stored, xxh3 of head
_FOOTER = struct.Struct("<8sHQQQQQ")  # magic, version, generation, offset, records, payload, xxh3
_ENTRY = struct.Struct("<16sQIQ")  # hidden key, offset, bytes of the page, xxh3 stored
_T = TypeVar("_T")
_NAME = re.compile(r"segment-(\d{8,12})\.kv")


class Miss(str, Enum):
    """Why a page could not be had."""

    ABSENT = "absent"  # never put, lost, expired or dropped
    DAMAGED = "damaged"  # checksum, truncation: the drive's fault
    UNAUTHENTIC = "unauthentic"  # checksums hold, the tag does not: tampered with, or another key
    STALE = "stale"  # a record of another generation or identity, whole otherwise
    IO = "io"  # the file could not be opened or read


class SegmentHeader(msgspec.Struct, frozen=True, array_like=True):
    """A segment's first block. `salt` and `check` are empty where pages are not encrypted.

    `run` is the generation at which the writing log was opened: cohort numbers mean something within
    a run only. `check` tells whether a key is the right one. `ephemeral`: the key was never in a file.
    """

    identity: bytes
    generation: int
    run: int
    cohort: int
    tenant: str
    created: float  # seconds since the epoch
    salt: bytes
    check: bytes
    ephemeral: bool

    def pack(self) -> bytes:
        body = msgspec.msgpack.encode(self)
        head = _SEGMENT.pack(_SEGMENT_MAGIC, VERSION, len(body), xxhash.xxh3_64_intdigest(body))
        assert len(head) + len(body) <= BLOCK
        return (head + body).ljust(BLOCK, b"\0")

    @staticmethod
    def is_ours(block: bytes) -> bool:
        """Whether a log of this version wrote it, even if it was damaged since."""
        if len(block) < _SEGMENT.size:
            return False
        magic, version, _, _ = _SEGMENT.unpack_from(block)
        return bool(magic == _SEGMENT_MAGIC and version == VERSION)

    @classmethod
    def unpack(cls, block: bytes) -> Self | None:
        """None for what no log wrote, or what this version does not understand."""
        if len(block) < BLOCK or not cls.is_ours(block):
            return None
        _, _, length, checksum = _SEGMENT.unpack_from(block)
        body = block[_SEGMENT.size : _SEGMENT.size + length]
        if xxhash.xxh3_64_intdigest(body) != checksum:
            return None
        return _decoded(body, cls)


class Head(msgspec.Struct, frozen=True, array_like=True):
    """What stands before a page. `key` is hidden where pages are encrypted (`SegmentCipher.hide`)."""

    identity: bytes
    key: bytes
    cohort: int
    generation: int
    number: int  # of the record within its segment, never used twice
    nbytes: int  # of the page

    def body(self) -> bytes:
        """The fields, which are authenticated together with the page where that is encrypted."""
        return msgspec.msgpack.encode(self)


class Entry(NamedTuple):
    """Where a record is: what a footer keeps of it."""

    key: bytes  # hidden where pages are encrypted
    offset: int  # of its head in the file
    nbytes: int  # of the page
    checksum: int  # xxh3_64 of what is stored after the head


def pack_head(body: bytes, stored: memoryview) -> tuple[bytes, int]:
    """(112 bytes, checksum of `stored`): the head of what is written after it."""
    checksum = xxhash.xxh3_64_intdigest(stored)
    head = _head(body, checksum)
    assert len(head) <= HEAD_BYTES, "a field of a head is out of its range"
    return head.ljust(HEAD_BYTES, b"\0"), checksum


def _head(body: bytes, checksum: int) -> bytes:
    bare = _RECORD.pack(_RECORD_MAGIC, VERSION, len(body), checksum, 0) + body
    own = xxhash.xxh3_64_intdigest(bare)
    return _RECORD.pack(_RECORD_MAGIC, VERSION, len(body), checksum, own) + body


def unpack_head(data: bytes | memoryview) -> tuple[Head, bytes, int] | None:
    """(head, its body, checksum of what follows), or None for what is no whole head."""
    if len(data) < HEAD_BYTES:
        return None
    magic, version, length, checksum, _ = _RECORD.unpack_from(data)
    if magic != _RECORD_MAGIC or version != VERSION or length > HEAD_BYTES - _RECORD.size:
        return None
    body = bytes(data[_RECORD.size : _RECORD.size + length])
    if _head(body, checksum) != bytes(data[: _RECORD.size + length]):
        return None
    head = _decoded(body, Head)
    return None if head is None else (head, body, checksum)


@dataclass(frozen=True, slots=True)
class Footer:
    """A segment's index, and its sums for those who do not need it whole."""

    generation: int
    entries: tuple[Entry, ...]

    def pack(self, offset: int) -> bytes:
        """Whole blocks, to be written at `offset`; the last bytes of the file say where they start."""
        body = pack_entries(self.entries)
        payload = sum(entry.nbytes for entry in self.entries)
        start = _FOOTER.pack(
            _FOOTER_MAGIC, VERSION, self.generation, offset, len(self.entries), payload, 0
        )
        checksum = xxhash.xxh3_64_intdigest(start + body)
        end = _FOOTER.pack(
            _FOOTER_MAGIC, VERSION, self.generation, offset, len(self.entries), payload, checksum
        )
        return body.ljust(aligned(len(body) + len(end)) - len(end), b"\0") + end


def footer_place(last: bytes, size: int) -> tuple[int, int] | None:
    """(offset of a footer, its entries) out of the last bytes of a file of `size` bytes."""
    if len(last) < _FOOTER.size:
        return None
    magic, version, _, offset, count, _, _ = _FOOTER.unpack(last[-_FOOTER.size :])
    if magic != _FOOTER_MAGIC or version != VERSION:
        return None
    if offset + aligned(count * _ENTRY.size + _FOOTER.size) != size:
        return None
    return offset, count


def unpack_footer(data: bytes) -> Footer | None:
    """`data` reaches from the footer's offset to the end of the file."""
    magic, version, generation, offset, count, payload, checksum = _FOOTER.unpack(
        data[-_FOOTER.size :]
    )
    body = data[: count * _ENTRY.size]
    start = _FOOTER.pack(magic, version, generation, offset, count, payload, 0)
    if xxhash.xxh3_64_intdigest(start + body) != checksum:
        return None
    return Footer(generation, tuple(map(Entry._make, _ENTRY.iter_unpack(body))))


def footer_bytes(records: int) -> int:
    return aligned(records * _ENTRY.size + _FOOTER.size)


def pack_entries(entries: tuple[Entry, ...]) -> bytes:
    return b"".join(_ENTRY.pack(*entry) for entry in entries)


def digest_of(generation: int, entries: tuple[Entry, ...]) -> bytes:
    """SHA-256 of what a segment holds, in the order in which it lies there."""
    ordered = tuple(sorted(entries, key=lambda entry: entry.offset))
    return hashlib.sha256(generation.to_bytes(8, "little") + pack_entries(ordered)).digest()


def aligned(nbytes: int) -> int:
    return -(-nbytes // BLOCK) * BLOCK


def segment_name(number: int) -> str:
    return f"segment-{number:08d}.kv"


def segment_number(name: str) -> int | None:
    """None for a name that is no segment's."""
    found = _NAME.fullmatch(name)
    return None if found is None else int(found[1])


def identity_digest(identity: bytes) -> bytes:
    """16 bytes that stand for whatever makes a page of one log useless to another."""
    return hashlib.blake2b(identity, digest_size=KEY_BYTES, person=b"headrace-kv-log").digest()


def _decoded(body: bytes, kind: type[_T]) -> _T | None:
    try:
        return decoder(kind).decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None
