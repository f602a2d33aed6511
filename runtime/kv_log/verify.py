"""Reading everything that lies in a directory of KV pages, without a log."""

from collections.abc import Iterator
from dataclasses import dataclass

from headrace.runtime.kv_log.keys import KeyRing, SegmentCipher
from headrace.runtime.kv_log.record import BLOCK, Entry, Miss, aligned
from headrace.runtime.kv_log.segment import Buffers, Disk, Found, decode, record_bytes
from headrace.runtime.kv_log.start import cipher_of


@dataclass(frozen=True, slots=True)
class Verified:
    """What became of a segment's pages. Without their key, checksums say that they are undamaged."""

    found: Found
    good: int
    bad: dict[Miss, int]  # only what there was
    decrypted: bool

    @property
    def is_good(self) -> bool:
        return not self.bad


def verify(segments: list[Found], keys: KeyRing | None) -> Iterator[Verified]:
    """Read every page of the segments. One that goes meanwhile is left out."""
    disk, buffers = Disk(direct=False), Buffers()
    for found in segments:
        cipher = cipher_of(found.header, keys)
        results = [_verify(disk, buffers, found, entry, cipher) for entry in found.entries]
        if Miss.IO in results and not found.path.exists():
            continue
        bad = {miss: results.count(miss) for miss in Miss if miss in results}
        yield Verified(found, results.count(None), bad, cipher is not None)


def _verify(
    disk: Disk, buffers: Buffers, found: Found, entry: Entry, cipher: SegmentCipher | None
) -> Miss | None:
    nbytes = record_bytes(entry.nbytes, encrypted=found.encrypted)
    start = entry.offset // BLOCK * BLOCK
    before = entry.offset - start
    with buffers.take(aligned(before + nbytes)) as memory, buffers.take(entry.nbytes) as page:
        try:
            if disk.read(found.path, start, memory) < before + nbytes:
                return Miss.DAMAGED
        except OSError:
            return Miss.IO
        record = memory[before : before + nbytes]
        wanted = None if found.encrypted and cipher is None else page
        return decode(record, found.header, entry.key, entry.nbytes, cipher, wanted)
