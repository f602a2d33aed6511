"""Blocks that are read ahead of who asks for them."""

import os
from pathlib import Path

import pytest
import torch
from leftovers import our_threads

from headrace.runtime.manifest import Block
from headrace.runtime.streaming.block_reads import BlockReads
from headrace.runtime.streaming.storage import BufferedStorage
from headrace.scheduler.errors import StoreError

PAGE = 4096
CPU = torch.device("cpu")


def make_block(folder: Path, name: str, nbytes: int) -> Block:
    file = folder / f"{name}.safetensors"
    file.write_bytes(os.urandom(PAGE + nbytes))
    return Block(name, file, PAGE, nbytes, "", {})


def test_bytes_are_the_same_begun_or_not(tmp_path: Path) -> None:
    begun, asked = make_block(tmp_path, "begun", 3 * PAGE), make_block(tmp_path, "asked", PAGE)
    with BufferedStorage(CPU, threads=2) as storage, BlockReads(storage) as reads:
        reads.begin(begun, CPU)
        reads.begin(begun, CPU)  # once
        for block in (asked, begun):
            data = reads.take(block, CPU)
            assert data.numpy().tobytes() == block.file.read_bytes()[PAGE:]


def test_an_empty_block_is_not_read(tmp_path: Path) -> None:
    with BufferedStorage(CPU, threads=1) as storage, BlockReads(storage) as reads:
        empty = Block("empty", tmp_path / "none", PAGE, 0, "", {})
        reads.begin(empty, CPU)
        assert reads.take(empty, CPU).nbytes == 0


def test_what_nobody_takes_is_over_at_the_end(tmp_path: Path) -> None:
    good, damaged = (make_block(tmp_path, name, 2 * PAGE) for name in ("good", "damaged"))
    os.truncate(damaged.file, 2 * PAGE)
    before = our_threads()
    with BufferedStorage(CPU, threads=1) as storage, BlockReads(storage) as reads:
        reads.begin(good, CPU)
        reads.begin(damaged, CPU)
        with pytest.raises(StoreError, match="damaged"):
            reads.take(damaged, CPU)
        reads.close()
        reads.close()
    assert our_threads() == before
