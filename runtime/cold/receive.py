"""A store's files out of the stores of other nodes that have them.

As with a pull, a block that is on its way is FILE.pulling, and has its name when its bytes have the hashes
that the store's manifest gives.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from headrace.runtime.block_file import sync_directory, write_durably
from headrace.runtime.cold.directory import has_its_size, locked, pulling, refuse_small_disk
from headrace.runtime.cold.source import ORIGIN, PEERS, ColdModel, Hydration
from headrace.runtime.cold.transfers import run_all
from headrace.runtime.manifest import MANIFEST, Block
from headrace.runtime.store import JOURNAL, Store
from headrace.scheduler.errors import StoreError

PIECE_BYTES = 8 << 20
PIECES_AT_ONCE = 4


class PeerLostError(Exception):
    """A peer that does not answer any more."""


class Peer(Protocol):
    """A node's store. Both raise PeerLostError."""

    def files(self) -> Mapping[str, int]:
        """Sizes of the files that are whole there, by name."""
        ...

    def read(self, name: str, offset: int, nbytes: int) -> bytes: ...


def files_of(path: Path, digest: str) -> dict[str, int]:
    """What the directory `path` has to give of the model with this digest: nothing, if it is no store of it."""
    if not (path / MANIFEST).exists():
        return {}
    store = Store.described(path)
    if store.digest != digest:
        return {}
    blocks = {block.file for block in store.blocks}
    there = [block.file for block in store.blocks if has_its_size(block)]
    there += [file for file in path.iterdir() if file not in blocks and _is_surrounding(file)]
    return {file.name: file.stat().st_size for file in there}


def _is_surrounding(file: Path) -> bool:
    own = (ORIGIN, JOURNAL)
    return file.is_file() and file.name not in own and file.suffix not in (".pulling", ".tmp")


def receive(wanted: Hydration, digest: str, peers: Sequence[Peer]) -> int:
    """Bring what a stage needs, and what every node does; returns bytes. Asks nobody if it is there already.

    StoreError when no peer has something of it, when the directory holds another model or has no room.
    """
    path = Path(wanted.store)
    with locked(path):
        receiving = _Receiving(path, digest, peers)
        if not (path / MANIFEST).exists():
            receiving.surroundings()
        store = Store.described(path)
        if store.digest != digest:
            raise StoreError(
                f"{path} on {os.uname().nodename} is the store of another model: its digest is"
                f" {store.digest}, and the driver's store has {digest}. Move it away, or use another path"
            )
        if wanted.layers:
            blocks = store.blocks_of(wanted.layers, first=wanted.first, last=wanted.last)
            receiving.blocks(store, [block for block in blocks if not has_its_size(block)])
        return receiving.nbytes


class _Receiving:
    """Files on their way to one directory. `nbytes` of them came."""

    def __init__(self, path: Path, digest: str, peers: Sequence[Peer]) -> None:
        self._path, self._digest, self._peers = path, digest, peers
        self._has: list[tuple[Peer, Mapping[str, int]]] | None = None
        self.nbytes = 0

    def surroundings(self) -> None:
        """What every node needs; the manifest at the very end, since it makes the directory a store."""
        peer, files = next(self._with(MANIFEST), (None, {}))
        if peer is None:
            raise self._nobody(MANIFEST)
        origin = ColdModel(PEERS, self._path.name)
        write_durably(self._path / ORIGIN, json.dumps(asdict(origin)).encode() + b"\n")
        small = sorted(
            (name for name in files if not name.endswith(".safetensors")), key=MANIFEST.__eq__
        )
        for name in small:
            write_durably(self._path / name, peer.read(name, 0, files[name]))
            self.nbytes += files[name]

    def blocks(self, store: Store, lacking: Sequence[Block]) -> None:
        refuse_small_disk(
            self._path, [(block.file, block.data_offset + block.nbytes) for block in lacking]
        )
        for block in lacking:
            self._block(store, block)

    def _block(self, store: Store, block: Block) -> None:
        """From the first peer that has it whole."""
        partial, size = pulling(block.file), block.data_offset + block.nbytes
        for peer, _ in self._with(block.file.name):
            try:
                _copy(peer, block.file.name, partial, size)
            except PeerLostError:
                continue
            if store.damaged_part(block, partial) is None:
                partial.replace(block.file)
                sync_directory(self._path)
                self.nbytes += size
                return
        partial.unlink(missing_ok=True)
        raise self._nobody(block.file.name)

    def _with(self, name: str) -> Iterator[tuple[Peer, Mapping[str, int]]]:
        if self._has is None:
            self._has = [(peer, _files(peer)) for peer in self._peers]
        return (each for each in self._has if name in each[1])

    def _nobody(self, name: str) -> StoreError:
        return StoreError(
            f"{self._path} on {os.uname().nodename} lacks {name}, and none of the"
            f" {len(self._peers)} nodes of the cluster has it undamaged at that path (model"
            f" {self._digest}): copy the store to one of them, or push it to a cold tier and give --cold URL"
        )


def _files(peer: Peer) -> Mapping[str, int]:
    try:
        return peer.files()
    except PeerLostError:
        return {}


def _copy(peer: Peer, name: str, target: Path, size: int) -> None:
    """`size` bytes of the peer's file, in pieces that come in any order; durable."""
    with target.open("wb", buffering=0) as stream:

        def bring(offset: int) -> None:
            piece = memoryview(peer.read(name, offset, min(PIECE_BYTES, size - offset)))
            while piece:
                written = os.pwrite(stream.fileno(), piece, offset)
                piece, offset = piece[written:], offset + written

        run_all(bring, range(0, size, PIECE_BYTES), PIECES_AT_ONCE)
        os.fsync(stream.fileno())
