"""Stores that are fetched from other nodes' stores, file by file."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from cold_stores import make_store

from headrace.runtime.cold.receive import PeerLostError, files_of, receive
from headrace.runtime.cold.source import Hydration
from headrace.runtime.store import Store
from headrace.scheduler.errors import StoreError


class Folder:
    """A peer that is a directory. It is lost after `reads` of them."""

    def __init__(self, path: Path, digest: str, reads: int = 1000) -> None:
        self._path, self._digest, self.left = path, digest, reads

    def files(self) -> Mapping[str, int]:
        return files_of(self._path, self._digest)

    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise PeerLostError(name)
        with (self._path / name).open("rb") as stream:
            return os.pread(stream.fileno(), nbytes, offset)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A store of 12 layers."""
    path = tmp_path / "whole"
    make_store(path, layers=12)
    (path / "tokenizer.json").write_text("{}")
    return path


def wanted(path: Path, *layers: int) -> Hydration:
    return Hydration(str(path), None, layers, first=0 in layers, last=11 in layers)


def test_a_node_gets_its_layers_and_what_every_node_needs(whole: Path, tmp_path: Path) -> None:
    path, source = tmp_path / "node" / "store", Store.open(whole)
    peer = Folder(whole, source.digest)
    brought = receive(wanted(path), source.digest, [peer])
    assert brought and Store.open(path).present == ()
    brought = receive(wanted(path, 0, 1), source.digest, [peer])
    store = Store.open(path)
    assert [block.name for block in store.present] == ["embed", "layer-00000", "layer-00001"]
    assert brought == sum(block.data_offset + block.nbytes for block in store.present)
    store.verify()
    assert (path / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    peer.left = 0
    assert receive(wanted(path, 0, 1), source.digest, [peer]) == 0  # asks nobody
    with pytest.raises(StoreError, match=r"lacks layers 2 .* give --from-peers, or --cold URL"):
        store.require(store.blocks_of([2], first=False, last=False))


def test_blocks_come_from_whoever_has_them_undamaged(whole: Path, tmp_path: Path) -> None:
    store = Store.open(whole)
    damaged = Path(shutil.copytree(whole, tmp_path / "damaged"))
    file = damaged / store.layers[3].file.name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (damaged / store.layers[4].file.name).unlink()
    folders = [
        Folder(damaged, store.digest),
        Folder(tmp_path / "none", store.digest),
        Folder(whole, store.digest, reads=1),
        Folder(whole, store.digest),
    ]
    path = tmp_path / "store"
    receive(wanted(path, 3, 4, 11), store.digest, folders)
    Store.open(path).verify()
    assert not list(path.glob("*.pulling"))


def test_what_nobody_has_is_named(whole: Path, tmp_path: Path) -> None:
    store = Store.open(whole)
    store.layers[5].file.unlink()
    path = tmp_path / "store"
    with pytest.raises(
        StoreError, match=r"lacks layer-00005\.safetensors, and none of the 1 nodes"
    ):
        receive(wanted(path, 4, 5), store.digest, [Folder(whole, store.digest)])
    assert [block.name for block in Store.open(path).present] == ["layer-00004"]
    with pytest.raises(StoreError, match="none of the 1 nodes"):
        receive(wanted(tmp_path / "new"), "0" * 32, [Folder(whole, "0" * 32)])


def test_another_models_directory_is_left_alone(whole: Path, tmp_path: Path) -> None:
    digest = Store.open(whole).digest
    before = {file.name: file.stat().st_mtime_ns for file in whole.iterdir()}
    with pytest.raises(StoreError, match="is the store of another model"):
        receive(wanted(whole, 0), "0" * 32, [Folder(whole, digest)])
    assert {file.name: file.stat().st_mtime_ns for file in whole.iterdir()} == before
