"""Stores and checkpoints of random weights, as fast as the disk takes them.

A store is planned by the converter itself, from a checkpoint whose header is real and whose weights
are a hole in a file. Random bytes take the place of encoded weights, and the converter then finishes
what it finds in its journal. No full-precision model is made and nothing is quantized.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from headrace.cluster.bench.random_weights import RandomWeights
from headrace.runtime.block_file import BlockWriter, Entry, lay_out, write_durably
from headrace.runtime.conversion.checkpoint import Checkpoint
from headrace.runtime.conversion.convert import convert
from headrace.runtime.conversion.described import WeightPlan
from headrace.runtime.conversion.journal import Journal
from headrace.runtime.conversion.part import Part
from headrace.runtime.conversion.plan import (
    BlockPlan,
    Options,
    plan_conversion,
)
from headrace.runtime.conversion.quantize import STORE_DTYPES, weight_spec
from headrace.runtime.manifest import MANIFEST, VERSION, Block, block_to_json
from headrace.runtime.skeleton import Skeleton, parse_config
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.sizes import format_size

SHARD_BYTES = 4 << 30
THREADS = 4


def tensors_of(config: Mapping[str, Any]) -> list[Entry]:
    """A checkpoint's tensors, by the names that its author gives them: experts one by one."""
    skeleton = Skeleton(parse_config(config, "config"), torch.bfloat16)
    places = skeleton.model.state_dict(keep_vars=True)
    own = {name: place for name, place in places.items() if name not in skeleton.tied_names}
    on_disk = revert_weight_conversion(skeleton.model, own)
    return [
        Entry(name, STORE_DTYPES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in on_disk.items()
    ]


def _write_surroundings(path: Path, config: Mapping[str, Any]) -> None:
    """config.json, and a tokenizer that has a word for every id."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    words = {f"w{i}": i for i in range(config["vocab_size"])}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w0"}
    (path / "tokenizer_config.json").write_text(json.dumps(described))


def write_hollow_checkpoint(path: Path, config: Mapping[str, Any]) -> None:
    """A checkpoint that says what it holds and holds nothing: its weights are a hole in a file."""
    _write_surroundings(path, config)
    header, end = {}, 0
    for entry in tensors_of(config):
        place = [end, end := end + entry.nbytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": place}
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)


def write_store(
    dest: Path,
    config: Mapping[str, Any],
    fmt: str,
    *,
    check: Callable[[Sequence[int]], None] = lambda _: None,
) -> Store:
    """A store of random weights in `fmt`; a finished one of the same configuration is opened.

    `check` is given the bytes of each layer before anything is written, to raise if they won't do.
    Raises HeadraceError when the drive has no room, saying how many layers would fit.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent) as folder:
        source = Path(folder)
        write_hollow_checkpoint(source, config)
        if not (dest / MANIFEST).exists():
            _write_blocks(Checkpoint(source), dest, Options(fmt), check)
        store = convert(source, dest, format=fmt)
    check([block.nbytes for block in store.layers])
    return store


def _write_blocks(
    checkpoint: Checkpoint, dest: Path, options: Options, check: Callable[[Sequence[int]], None]
) -> None:
    plan = plan_conversion(checkpoint, options)
    check([block.layout.nbytes for block in plan.blocks[1:-1]])
    weights = RandomWeights(len(plan.layer_shapes))
    dest.mkdir(exist_ok=True)
    source = checkpoint.fingerprint()
    identity = {"version": VERSION, "source": source, "options": options.as_json()}
    with Journal(dest, identity) as journal, ThreadPoolExecutor(THREADS) as pool:
        sizes = {block.name: block.layout.file_bytes for block in plan.blocks}
        missing = sum(size for name, size in sizes.items() if name not in journal.done)
        check_room(dest.parent, list(sizes.values()), missing, shutil.disk_usage(dest).free)
        writing = [
            pool.submit(_write_block, dest, block, weights)
            for block in plan.blocks
            if block.name not in journal.done
        ]
        for written in as_completed(writing):
            journal.record(written.result())


def check_room(directory: Path, blocks: Sequence[int], missing: int, free: int) -> None:
    """HeadraceError unless `missing` of a store's bytes fit; `blocks` are its files' sizes."""
    if missing <= free:
        return
    embed, *layers, head = blocks
    fitting = sum(total <= free for total in accumulate(layers, initial=embed + head)) - 1
    fits = f"use --layers {fitting} or another" if fitting > 0 else "use another"
    raise HeadraceError(
        f"{directory} has {format_size(free)} free and the store takes {format_size(sum(blocks))}: "
        f"{fits} --directory"
    )


def _write_block(dest: Path, block: BlockPlan, weights: RandomWeights) -> dict[str, Any]:
    file = dest / f"{block.name}.safetensors"
    random = Random(block.name)
    with BlockWriter(file, block.layout) as writer:
        for weight in block.weights:
            for name, data in _contents(weight, weights, random):
                writer.write(name, data)
        written = writer.finish()
    specs = {
        weight.source.name: weight_spec(
            weight.format,
            weight.source.shape,
            weight.parts,
            block.layout.tensors,
            weights.state(weight.source.shape) if weight.format == "nf4" else None,
        )
        for weight in block.weights
    }
    whole = Block(
        block.name, file, len(block.layout.header), block.layout.nbytes, written.data_hash, specs
    )
    return block_to_json(whole, written.header_hash)


def _contents(
    plan: WeightPlan, weights: RandomWeights, random: Random
) -> Iterator[tuple[str, memoryview]]:
    source = plan.source
    for part in plan.parts:
        for data in weights.part(source.name, plan.format, part, source.shape, random):
            yield part.entry.name, data


@dataclass(frozen=True, slots=True)
class _Shard:
    file: str
    entries: tuple[Entry, ...]


def write_checkpoint(
    dest: Path,
    config: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A bf16 Hugging Face checkpoint of random weights: shards and their index, written last."""
    index = dest / "model.safetensors.index.json"
    if index.exists():
        return
    _write_surroundings(dest, config)
    weights = RandomWeights(config["num_hidden_layers"])
    shards = _shards(tensors_of(config), shard_bytes)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda shard: _write_shard(dest, shard, weights), shards))
    places = {entry.name: shard.file for shard in shards for entry in shard.entries}
    size = sum(entry.nbytes for shard in shards for entry in shard.entries)
    described = {"metadata": {"total_size": size}, "weight_map": places}
    write_durably(index, json.dumps(described, indent=2).encode())


def _shards(entries: Sequence[Entry], shard_bytes: int) -> list[_Shard]:
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and sum(e.nbytes for e in groups[-1]) + entry.nbytes > shard_bytes:
            groups.append([])
        groups[-1].append(entry)
    return [
        _Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, 1)
    ]


def _write_shard(dest: Path, shard: _Shard, weights: RandomWeights) -> None:
    random = Random(shard.file)
    with BlockWriter(dest / shard.file, lay_out(shard.entries)) as writer:
        for entry in shard.entries:
            part = Part("data", entry)
            for data in weights.part(entry.name, "raw", part, entry.shape, random):
                writer.write(entry.name, data)
        writer.finish()
