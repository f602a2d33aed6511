"""Stage's split layers in small: files of random bytes, of which experts take a page and a half each."""

import os
from pathlib import Path

import torch

from headrace.runtime.expert_extents import split_block
from headrace.runtime.manifest import Block, TensorSpec, WeightSpec
from headrace.runtime.streaming.expert_streamer import ExpertStreamer
from headrace.runtime.streaming.loads import Storage

CPU = torch.device("cpu")
PAGE = 4096
LAYERS = (2, 3, 7)
EXPERTS = 8
ODD = 3 * PAGE // 2
EXTENT = 2 * PAGE
"""Bytes that are read for one expert, which shares a page with a neighbour."""


def make_blocks(folder: Path) -> dict[int, Block]:
    return {layer: _make_block(folder, layer) for layer in LAYERS}


def _make_block(folder: Path, layer: int) -> Block:
    """One page that every token needs, then experts."""
    names = ["norm", *(f"mlp.experts.{e}.down_proj" for e in range(EXPERTS))]
    sizes = [PAGE, *[ODD] * EXPERTS]
    weights, offset = {}, 0
    for name, size in zip(names, sizes, strict=True):
        part = TensorSpec("U8", (size,), offset, size)
        weights[name] = WeightSpec("raw", (size,), {"data": part})
        offset += size
    file = folder / f"layer-{layer:05}.safetensors"
    file.write_bytes(b"h" * PAGE + os.urandom(-(-offset // PAGE) * PAGE))
    return Block(file.stem, file, PAGE, file.stat().st_size - PAGE, "", weights)


def extent(block: Block, expert: int) -> tuple[Path, int, int]:
    """What is read for an expert: a file's bytes from an offset on, and how many."""
    first = (PAGE + expert * ODD) // PAGE * PAGE
    return block.file, block.data_offset + first, EXTENT


def content(block: Block, expert: int) -> bytes:
    file, offset, nbytes = extent(block, expert)
    return file.read_bytes()[offset : offset + nbytes]


def open_experts(
    blocks: dict[int, Block],
    storage: Storage,
    slots: int,
    host_slots: int = 0,
    device: torch.device = CPU,
    held: int = 0,
) -> ExpertStreamer:
    splits = {layer: split_block(block) for layer, block in blocks.items()}
    return ExpertStreamer(
        blocks=blocks,
        splits={layer: split for layer, split in splits.items() if split is not None},
        storage=storage,
        device=device,
        slots=slots,
        slot_bytes=EXTENT,
        host_slots=host_slots,
        held=held,
    )
