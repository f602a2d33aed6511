"""What a deletion of KV pages says of itself."""

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple


class Deleted(NamedTuple):
    """One segment that was to be deleted."""

    path: Path
    tenant: str
    pages: int
    payload: int  # bytes of pages
    nbytes: int  # of the file
    digest: bytes  # SHA-256 of its index: hidden keys, places, sizes and checksums
    encrypted: bool
    opened: bool  # by the key at hand, if not by one that died with its process
    left: bool  # the file could not be deleted


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof for who asked for a deletion; JSON types only.

    `key_destroyed`: the keys of everything here are gone, so that what a drive may still hold of it is
    noise; False if anything was not encrypted, or its key is still in a file. `pages_in_memory` never
    reached the drive. `digest` is SHA-256 over the segments' indexes, empty without segments. `left` names
    files that could not be deleted.
    """

    what: str
    tenants: list[str]
    pages: int
    bytes: int
    segments: int
    file_bytes: int
    pages_in_memory: int
    at: str
    digest: str
    encrypted: bool
    key_destroyed: bool
    left: list[str]


def receipt(
    what: str,
    deleted: Iterable[Deleted],
    *,
    in_memory: int = 0,
    key_destroyed: bool,
    now: float | None = None,
) -> Receipt:
    """`key_destroyed` is of the keys at hand. `now` in seconds since the epoch; by default the clock's."""
    segments = sorted(deleted)
    done = [segment for segment in segments if not segment.left]
    encrypted = all(segment.encrypted for segment in segments)
    total = hashlib.sha256(b"".join(segment.digest for segment in done))
    return Receipt(
        what=what,
        tenants=sorted({segment.tenant for segment in segments}),
        pages=sum(segment.pages for segment in done),
        bytes=sum(segment.payload for segment in done),
        segments=len(done),
        file_bytes=sum(segment.nbytes for segment in done),
        pages_in_memory=in_memory,
        at=datetime.fromtimestamp(time.time() if now is None else now, UTC).isoformat(),
        digest=total.hexdigest() if done else "",
        encrypted=encrypted and bool(segments),
        key_destroyed=key_destroyed and all(s.encrypted and s.opened for s in segments),
        left=[segment.path.name for segment in segments if segment.left],
    )
