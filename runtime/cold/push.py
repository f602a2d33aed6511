"""A store into a cold tier: what is not there yet, and then the record that makes it a model.

A push that is killed leaves objects and no record; the next one finds them by their hashes and goes on.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from headrace.runtime.cold.chunks import Chunk, cut_block, cut_bytes
from headrace.runtime.cold.codec import encode, encode_delta
from headrace.runtime.cold.lease import PUSH, Lease
from headrace.runtime.cold.objects import (
    ChunkReader,
    ObjectIndex,
    find_record,
    hash_of,
    object_path,
    read_record,
    record_path,
)
from headrace.runtime.cold.record import ChunkRef, FileRecord, ModelRecord
from headrace.runtime.cold.source import ORIGIN, ColdModel
from headrace.runtime.cold.tier import ColdTier
from headrace.runtime.cold.transfers import JOBS, run_all
from headrace.runtime.manifest import Block
from headrace.runtime.store import JOURNAL, Store
from headrace.scheduler.errors import ColdTierError, StoreError

DELTA_PAYS = 0.5
"""A difference of less than this share of a chunk is not compared with what the chunk takes alone."""


@dataclass(frozen=True, slots=True)
class PushReport:
    """Bytes of the store, those that were `found` in the tier already, and those of new objects: they
    stand for `nbytes` - `found` and take `stored`, `deltas` of `objects` as differences."""

    nbytes: int
    found: int
    stored: int
    objects: int
    deltas: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Sent:
    """`done` of `total` bytes of the store are in the tier."""

    file: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """A chunk on its way: the `index`th of a file, and its bytes."""

    file: str
    index: int
    chunk: Chunk
    data: bytes


def push(
    store: Path,
    model: ColdModel,
    *,
    base: str | None = None,
    repair: bool = False,
    jobs: int = JOBS,
    progress: Callable[[Sent], None] | None = None,
) -> PushReport:
    """Puts the whole store in the directory `store` into a tier under the model's name.

    `base` is a model there of which this one is a fine-tune: where their chunks differ, the difference
    is stored, if it is smaller. `repair` reads what is found there and replaces what is damaged.
    Holds 2 chunks a job in memory, and a few times that while they are compressed.

    StoreError when the store lacks blocks or is damaged, ColdTierError when the tier cannot be
    written, has another model of that name or no such base, or somebody is removing models there.
    """
    began, opened, tier = time.monotonic(), Store.open(store), ColdTier(model.url)
    opened.require(opened.blocks)
    _refuse_another_model(tier, model, opened)
    with Lease(tier, PUSH) as lease:
        pushed = _Push(opened, model, tier, base, repair, progress)
        run_all(pushed.send, pushed.pieces(lease), jobs)
        lease.refresh()
        _refuse_another_model(tier, model, opened)  # somebody may have been faster
        tier.write(record_path(model.name), pushed.record().encode())
    return replace(pushed.report, seconds=time.monotonic() - began)


def _refuse_another_model(tier: ColdTier, model: ColdModel, store: Store) -> None:
    there = find_record(tier, model.name)
    if there is not None and there.digest != store.digest:
        raise ColdTierError(
            f"{model} is another model (digest {there.digest}, that of {store.path} is {store.digest}): "
            f"choose another name, or remove it first: headrace cold remove {model}"
        )


class _Push:
    """The pieces of a store, and what has become of them."""

    def __init__(
        self,
        store: Store,
        model: ColdModel,
        tier: ColdTier,
        base: str | None,
        repair: bool,
        progress: Callable[[Sent], None] | None,
    ) -> None:
        self._store, self._model, self._tier, self._base = store, model, tier, base
        self._repair, self._progress = repair, progress
        self._index = ObjectIndex(tier)
        self._reader = ChunkReader(tier, str(model))
        self._bases = {} if base is None else _chunks_at(tier, ColdModel(model.url, base))
        self._files = _files_of(store)
        self._refs: dict[str, dict[int, ChunkRef]] = {name: {} for name in self._files}
        self._lock = threading.Lock()
        self._done = 0
        self._total = sum((store.path / name).stat().st_size for name in self._files)
        self.report = PushReport(self._total, 0, 0, 0, 0, 0.0)

    def pieces(self, lease: Lease) -> Iterator[_Piece]:
        """Every chunk of the store, in the order of its files. StoreError for a block that is damaged."""
        for name, block in self._files.items():
            file = self._store.path / name
            chunks = cut_bytes(file.stat().st_size) if block is None else cut_block(block)
            hasher = xxhash.xxh3_64()
            with file.open("rb", buffering=0) as stream:
                for i, chunk in enumerate(chunks):
                    data = _read(stream.fileno(), chunk, file)
                    if block is not None and chunk.offset >= block.data_offset:
                        hasher.update(data)
                    lease.refresh()
                    yield _Piece(name, i, chunk, data)
            if block is not None and hasher.hexdigest() != block.xxh3_64:
                raise StoreError(
                    f"block {block.name!r} is damaged: the data of {file} has changed since it was written;"
                    " it was not pushed"
                )

    def send(self, piece: _Piece) -> None:
        """See to it that the piece's chunk is in the tier."""
        digest = hash_of(piece.data)
        ref = self._index.find(digest, len(piece.data))
        stored = None
        if ref is None:
            ref, stored = self._encode(piece, digest)
        elif self._repair and not self._reader.is_good(ref, piece.file):
            stored = self._encode_again(piece, ref)
        if stored is not None:
            self._tier.write(object_path(ref.object), stored)
            self._index.add(ref)
        self._count(piece, ref, stored)

    def record(self) -> ModelRecord:
        files = []
        for name, block in self._files.items():
            refs = tuple(ref for _, ref in sorted(self._refs[name].items()))
            nbytes = sum(ref.nbytes for ref in refs)
            files.append(FileRecord(name, nbytes, None if block is None else block.name, refs))
        return ModelRecord(
            self._model.name, self._store.digest, time.time(), self._base, tuple(files)
        )

    def _encode(self, piece: _Piece, digest: str) -> tuple[ChunkRef, bytes]:
        """The chunk's object, and how to refer to it."""
        alone, size = ChunkRef(digest, len(piece.data)), len(piece.data)
        like = self._bases.get((piece.file, piece.chunk.offset))
        if like is None or like.nbytes != size:
            return alone, encode(piece.data, piece.chunk.runs)
        # Of a base that is itself a difference, the one that it is a difference from: one read more
        # brings any chunk.
        root = like.base or like.hash
        delta = self._delta(piece, root)
        if len(delta) < DELTA_PAYS * size:
            return replace(alone, base=root), delta
        whole = encode(piece.data, piece.chunk.runs)
        return (replace(alone, base=root), delta) if len(delta) < len(whole) else (alone, whole)

    def _encode_again(self, piece: _Piece, ref: ChunkRef) -> bytes:
        """The object of that very name, which other models may refer to."""
        if ref.base is None:
            return encode(piece.data, piece.chunk.runs)
        return self._delta(piece, ref.base)

    def _delta(self, piece: _Piece, base: str) -> bytes:
        theirs = self._reader.read(ChunkRef(base, len(piece.data)), f"the base of {piece.file}")
        return encode_delta(piece.data, theirs, piece.chunk.runs)

    def _count(self, piece: _Piece, ref: ChunkRef, stored: bytes | None) -> None:
        size = len(piece.data)
        with self._lock:
            self._refs[piece.file][piece.index] = ref
            self._done += size
            if stored is None:
                self.report = replace(self.report, found=self.report.found + size)
            else:
                so_far = self.report
                self.report = replace(
                    so_far,
                    stored=so_far.stored + len(stored),
                    objects=so_far.objects + 1,
                    deltas=so_far.deltas + (ref.base is not None),
                )
            if self._progress:
                self._progress(Sent(piece.file, self._done, self._total))


def _files_of(store: Store) -> dict[str, Block | None]:
    """What makes the directory a store, by name: first what every node needs, then blocks."""
    blocks = {block.file.name: block for block in store.blocks}
    others = sorted(
        file.name
        for file in store.path.iterdir()
        if file.is_file()
        and not file.name.startswith(("headrace-", "."))
        and file.suffix not in (".tmp", ".pulling", ".safetensors")
    )
    assert ORIGIN.startswith("headrace-") and JOURNAL.startswith("headrace-")
    return {**dict.fromkeys(others), **blocks}


def _chunks_at(tier: ColdTier, base: ColdModel) -> dict[tuple[str, int], ChunkRef]:
    """The chunks of a model by file and offset."""
    found = {}
    for file in read_record(tier, base).files:
        offset = 0
        for chunk in file.chunks:
            found[file.name, offset] = chunk
            offset += chunk.nbytes
    return found


def _read(descriptor: int, chunk: Chunk, file: Path) -> bytes:
    data = bytearray()
    while len(data) < chunk.nbytes:
        got = os.pread(descriptor, chunk.nbytes - len(data), chunk.offset + len(data))
        if not got:
            raise StoreError(f"{file} ended while it was read; is it being replaced?")
        data += got
    return bytes(data)
