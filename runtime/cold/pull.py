"""A model out of a cold tier into a store's directory: all of it, or what a node needs.

A block that is on its way is FILE.pulling, and has its name when every byte of it is verified. So a pull
that is killed goes on where it was: of what is there, chunks whose hashes are right are not fetched again.
One process at a time writes to a directory; others wait, and find what they need.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace.runtime.block_file import sync_directory, write_durably
from headrace.runtime.cold.directory import has_its_size, locked, pulling, refuse_small_disk
from headrace.runtime.cold.objects import ChunkReader, hash_of, read_record
from headrace.runtime.cold.record import ChunkRef, FileRecord, ModelRecord
from headrace.runtime.cold.source import ORIGIN, ColdModel, Hydration, read_origin
from headrace.runtime.cold.tier import ColdTier
from headrace.runtime.cold.transfers import JOBS, run_all
from headrace.runtime.manifest import MANIFEST, Block
from headrace.runtime.store import Store
from headrace.scheduler.errors import ColdTierError, StoreError

Choose = Callable[[Store], Iterable[Block]]
"""Which blocks of a store are wanted."""


@dataclass(frozen=True, slots=True)
class PullReport:
    """Bytes that were `fetched`, and that a pull before this one had left (`resumed`)."""

    fetched: int
    resumed: int
    damaged: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Received:
    """`done` of `total` bytes that were not there are there; `resumed` of them without being fetched."""

    file: str
    done: int
    total: int
    resumed: int


def hydrate(wanted: Hydration) -> PullReport:
    """`pull` what a stage needs. Touches no network where it is there already."""

    def choose(store: Store) -> Iterable[Block]:
        return store.blocks_of(wanted.layers, first=wanted.first, last=wanted.last)

    assert wanted.cold is not None
    return pull(wanted.cold, Path(wanted.store), choose if wanted.layers else nothing)


def everything(store: Store) -> Iterable[Block]:
    return store.blocks


def nothing(_: Store) -> Iterable[Block]:
    return ()


def pull(
    model: ColdModel,
    store: Path,
    choose: Choose = everything,
    *,
    verify: bool = False,
    jobs: int = JOBS,
    progress: Callable[[Received], None] | None = None,
) -> PullReport:
    """Brings the blocks that `choose` names, and what every node needs, to the directory `store`.

    What is there stays if its size is right, or with `verify` if all of its bytes are; else those
    chunks of it that are damaged are fetched. StoreError when the directory has another model or no
    room, ColdTierError when the tier has no such model, or not all of it.
    """
    began = time.monotonic()
    with locked(store):
        if not verify and _is_there(store, choose):
            return PullReport(0, 0, (), time.monotonic() - began)
        tier = ColdTier(model.url)
        fetching = _Pull(model, tier, read_record(tier, model), store, jobs, progress)
        damaged = fetching.run(choose, verify)
        return PullReport(fetching.fetched, fetching.resumed, damaged, time.monotonic() - began)


def _is_there(path: Path, choose: Choose) -> bool:
    if not (path / MANIFEST).exists() or read_origin(path) is None:
        return False
    store = Store.described(path)
    return all(has_its_size(block) for block in choose(store))


class _Pull:
    """Fetches files of one model. `fetched` and `resumed` count bytes of chunks."""

    def __init__(
        self,
        model: ColdModel,
        tier: ColdTier,
        record: ModelRecord,
        path: Path,
        jobs: int,
        progress: Callable[[Received], None] | None,
    ) -> None:
        self._model, self._record, self._path, self._jobs = model, record, path, jobs
        self._reader, self._progress = ChunkReader(tier, str(model)), progress
        self._lock = threading.Lock()
        self._total = 0
        self.fetched = self.resumed = 0

    def run(self, choose: Choose, verify: bool) -> tuple[str, ...]:
        """Returns the names of files that were there and damaged."""
        self._refuse_another_model()
        damaged = self._surroundings(verify)
        store = Store.described(self._path)
        if store.digest != self._record.digest:
            raise ColdTierError(
                f"the record of {self._model} is damaged: it names another model than its manifest; push"
                " the store again from where it is whole"
            )
        blocks = {block.file.name: block for block in choose(store)}
        files = [file for file in self._record.files if file.name in blocks]
        bad = [file for file in files if self._set_aside(store, blocks[file.name], verify)]
        lacking = [file for file in files if not (self._path / file.name).exists()]
        refuse_small_disk(self._path, [(self._path / file.name, file.nbytes) for file in lacking])
        self._fetch(lacking, lambda name, file: _damage(store, blocks[name], file))
        return (*damaged, *(file.name for file in bad))

    def _refuse_another_model(self) -> None:
        if not (self._path / MANIFEST).exists():
            return
        found = Store.described(self._path).digest
        if found != self._record.digest:
            raise StoreError(
                f"{self._path} is the store of another model (digest {found}, that of {self._model} is "
                f"{self._record.digest}): choose another directory"
            )

    def _surroundings(self, verify: bool) -> tuple[str, ...]:
        """What every node needs; the manifest at the very end, since it makes the directory a store."""
        wanted = [file for file in self._record.files if file.block is None]
        bad = [file for file in wanted if self._differs(file, verify)]
        lacking = [file for file in wanted if file in bad or not self._has(file)]
        write_durably(self._path / ORIGIN, json.dumps(asdict(self._model)).encode() + b"\n")
        self._fetch([file for file in lacking if file.name != MANIFEST])
        self._fetch([file for file in lacking if file.name == MANIFEST])
        return tuple(file.name for file in bad)

    def _has(self, file: FileRecord) -> bool:
        return (self._path / file.name).exists()

    def _differs(self, file: FileRecord, verify: bool) -> bool:
        if not (verify and self._has(file)):
            return False
        data, offset = (self._path / file.name).read_bytes(), 0
        for chunk in file.chunks:
            if hash_of(data[offset : offset + chunk.nbytes]) != chunk.hash:
                return True
            offset += chunk.nbytes
        return offset != len(data)

    def _set_aside(self, store: Store, block: Block, verify: bool) -> bool:
        """Whether a file that is there is damaged: it then is one of which chunks are still to come."""
        if not block.file.exists():
            return False
        if has_its_size(block) and not (verify and store.damaged_part(block, block.file)):
            return False
        block.file.replace(pulling(block.file))
        return True

    def _fetch(
        self,
        files: Sequence[FileRecord],
        damage: Callable[[str, Path], str | None] = lambda name, file: None,
    ) -> None:
        """Make these files; `damage` says what is wrong with one before it gets its name."""
        self._total += sum(file.nbytes for file in files)
        made: list[_Assembly] = []

        def pieces() -> Iterator[tuple[_Assembly, int, ChunkRef]]:
            for file in files:
                assembly = _Assembly(self._path / file.name, file)
                made.append(assembly)
                offset = 0
                for chunk in file.chunks:
                    yield assembly, offset, chunk
                    offset += chunk.nbytes
                if not file.chunks:
                    assembly.finish()

        def bring(piece: tuple[_Assembly, int, ChunkRef]) -> None:
            assembly, offset, chunk = piece
            name = assembly.file.name
            there = assembly.has(offset, chunk)
            if not there:
                assembly.put(offset, self._reader.read(chunk, name))
            self._count(name, chunk.nbytes, there)
            if assembly.is_last():
                wrong = damage(name, assembly.partial)
                if wrong is not None:
                    assembly.discard()
                    raise ColdTierError(
                        f"the chunks of {name} of {self._model} do not make its block ({wrong}): push the"
                        " store again from where it is whole"
                    )
                assembly.finish()

        try:
            run_all(bring, pieces(), self._jobs)
        finally:
            for assembly in made:
                assembly.close()

    def _count(self, name: str, nbytes: int, there: bool) -> None:
        with self._lock:
            if there:
                self.resumed += nbytes
            else:
                self.fetched += nbytes
            if self._progress:
                done = self.fetched + self.resumed
                self._progress(Received(name, done, self._total, self.resumed))


class _Assembly:
    """A file that is being made of chunks, in any order."""

    def __init__(self, target: Path, file: FileRecord) -> None:
        self.file, self.partial, self._target = file, pulling(target), target
        self._resumes = self.partial.exists()
        self._left = len(file.chunks)
        self._lock = threading.Lock()
        self._descriptor: int | None = os.open(
            self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        os.ftruncate(self._descriptor, file.nbytes)

    def has(self, offset: int, chunk: ChunkRef) -> bool:
        """Whether the chunk is there from before. What is there is not trusted."""
        if not self._resumes:
            return False
        assert self._descriptor is not None
        return hash_of(os.pread(self._descriptor, chunk.nbytes, offset)) == chunk.hash

    def put(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        assert self._descriptor is not None
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written

    def is_last(self) -> bool:
        """Count a chunk that is there; whether it was the last one."""
        with self._lock:
            self._left -= 1
            return self._left == 0

    def finish(self) -> None:
        """Give the file its name, durably."""
        assert self._descriptor is not None
        os.fsync(self._descriptor)
        self.close()
        self.partial.replace(self._target)
        sync_directory(self._target.parent)

    def discard(self) -> None:
        self.partial.unlink()

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


def _damage(store: Store, block: Block, file: Path) -> str | None:
    return store.damaged_part(block, file)
