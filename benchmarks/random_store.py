"""Stores and checkpoints of random weights, as fast as the disk takes them.

    python benchmarks/random_store.py STORE --shape llama-70b --layers 20 --format nf4
    python benchmarks/random_store.py CHECKPOINT --shape llama-8b --format checkpoint

A store is planned by the converter itself, from a checkpoint whose header is real and whose weights
are a hole in a file. Random bytes take the place of encoded weights, the converter then finishes
what it finds in its journal. No full-precision model is made and nothing is quantized. Scales are
such that activations stay of order one: weights have a standard deviation of 0.02 / sqrt(layers),
norms are one.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from random import Random
from typing import Any

import torch
from shapes import SHAPES, config_of
from torch import Tensor, nn

from headrace.runtime.block_file import BlockWriter, Entry, lay_out, write_durably
from headrace.runtime.checkpoint import COMPANIONS, Checkpoint
from headrace.runtime.conversion_plan import BlockPlan, Options, WeightPlan, plan_conversion
from headrace.runtime.convert import convert
from headrace.runtime.convert_journal import Journal
from headrace.runtime.plugs import is_experts, num_experts
from headrace.runtime.quantize import STATE_BYTES, Part, encode, weight_spec
from headrace.runtime.skeleton import Skeleton, parse_config
from headrace.runtime.store import MANIFEST, VERSION, Block, Store, block_to_json

TOKENIZER = Path(__file__).parent.parent / "examples" / "stories-9m"
FORMATS = ("nf4", "int8", "bf16")
POOL_BYTES = 64 << 20
CHUNK_BYTES = 8 << 20
SHARD_BYTES = 4 << 30
THREADS = 4


class Weights:
    """Random bytes of every kind that a store needs, made once and read from random places on."""

    def __init__(self, layers: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        std = 0.02 / sqrt(layers)
        words = torch.randint(-(2**63), 2**63 - 1, (POOL_BYTES // 8,), generator=generator)
        normal = torch.randn(POOL_BYTES // 4, generator=generator) * std
        # Around 1, so that neighbouring groups differ as those of real weights do.
        spread = torch.rand(POOL_BYTES // 16, generator=generator) + 0.5
        sample = encode("x", torch.ones(1, 64, dtype=torch.bfloat16), "nf4")
        self._code = sample["x.quant_map"]
        self._state = json.loads(bytes(sample["x.quant_state.bitsandbytes__nf4"].tolist()))
        self._pools = {
            "noise": _bytes_of(words),
            "bf16": _bytes_of(normal.bfloat16()),
            # Uniform codes have the table's root mean square, uniform int8 that of a ramp.
            "absmax": _bytes_of(spread * (std / float(self._code.square().mean().sqrt()))),
            "scale": _bytes_of(spread * (std * sqrt(3))),
        }

    def state(self, shape: Sequence[int]) -> dict[str, Any]:
        """What bitsandbytes saves beside a 4-bit weight of this logical shape."""
        return {**self._state, "shape": list(shape)}

    def part(
        self, weight: str, fmt: str, part: Part, shape: Sequence[int], random: Random
    ) -> Iterator[memoryview]:
        """The bytes of one stored tensor, a bounded number at a time."""
        nbytes = part.entry.nbytes
        if fmt == "raw":
            assert part.entry.dtype == "BF16", part
            if len(shape) > 1:
                yield from self._from_pool("bf16", nbytes, random)
                return
            # Vectors: norms multiply by one, biases add zero.
            fill = 1.0 if weight.endswith("weight") else 0.0
            yield _bytes_of(torch.full(tuple(shape), fill, dtype=torch.bfloat16))
        elif part.role == "code":
            yield _bytes_of(self._code)
        elif part.role == "state":
            yield memoryview(json.dumps(self.state(shape)).encode().ljust(STATE_BYTES))
        elif part.role == "layout":
            yield memoryview(bytes(nbytes))
        else:
            pool = "noise" if part.role == "data" else part.role
            yield from self._from_pool(pool, nbytes, random)

    def _from_pool(self, name: str, nbytes: int, random: Random) -> Iterator[memoryview]:
        pool = self._pools[name]
        while nbytes:
            size = min(nbytes, CHUNK_BYTES, len(pool))
            start = random.randrange((len(pool) - size) // 4 + 1) * 4
            yield pool[start : start + size]
            nbytes -= size


def _bytes_of(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return data


def tensors_of(config: Mapping[str, Any]) -> list[Entry]:
    """A checkpoint's tensors, in the order of the model: experts one by one, tied ones once."""
    skeleton = Skeleton(parse_config(config, "config"), torch.bfloat16)
    fused = {name: m for name, m in skeleton.model.named_modules() if is_experts(m)}
    entries: list[Entry] = []
    for name, place in skeleton.model.state_dict(keep_vars=True).items():
        owner, _, attribute = name.rpartition(".")
        if name in skeleton.tied_names:
            continue
        if owner in fused:
            entries += _expert_entries(owner, attribute, fused[owner], tuple(place.shape))
        else:
            entries.append(Entry(name, "BF16", tuple(place.shape)))
    return entries


def _expert_entries(
    owner: str, attribute: str, experts: nn.Module, shape: tuple[int, ...]
) -> Iterator[Entry]:
    """transformers fuses what checkpoints hold by expert: gate and up, [experts, 2 rows, columns]."""
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[attribute]
    rows, columns = shape[1] // len(parts), shape[2]
    for expert in range(num_experts(experts)):
        for part in parts:
            yield Entry(f"{owner}.{expert}.{part}.weight", "BF16", (rows, columns))


def _write_surroundings(path: Path, config: Mapping[str, Any]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    for pattern in COMPANIONS:
        for file in TOKENIZER.glob(pattern):
            shutil.copy(file, path)


def write_hollow_checkpoint(path: Path, config: Mapping[str, Any]) -> None:
    """A checkpoint that says what it holds and holds nothing: its weights are a hole in a file."""
    _write_surroundings(path, config)
    layout = lay_out(tensors_of(config))
    with (path / "model.safetensors").open("wb") as out:
        out.write(layout.header)
        out.truncate(layout.file_bytes)


def write_store(
    dest: Path, config: Mapping[str, Any], fmt: str, *, threads: int = THREADS, seed: int = 0
) -> Store:
    """A store of random weights in `fmt`; a finished one of the same configuration is opened."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent) as folder:
        source = Path(folder)
        write_hollow_checkpoint(source, config)
        if not (dest / MANIFEST).exists():
            weights = Weights(config["num_hidden_layers"], seed)
            _write_blocks(Checkpoint(source), dest, Options(fmt), weights, threads)
        return convert(source, dest, format=fmt)


def _write_blocks(
    checkpoint: Checkpoint, dest: Path, options: Options, weights: Weights, threads: int
) -> None:
    dest.mkdir(exist_ok=True)
    plan = plan_conversion(checkpoint, options)
    source = checkpoint.fingerprint()
    identity = {"version": VERSION, "source": source, "options": options.as_json()}
    with Journal(dest, identity) as journal, ThreadPoolExecutor(threads) as pool:
        writing = [
            pool.submit(_write_block, dest, block, weights)
            for block in plan.blocks
            if block.name not in journal.done
        ]
        for written in as_completed(writing):
            journal.record(written.result())


def _write_block(dest: Path, block: BlockPlan, weights: Weights) -> dict[str, Any]:
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
    plan: WeightPlan, weights: Weights, random: Random
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
    threads: int = THREADS,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """A bf16 Hugging Face checkpoint of random weights: shards and their index, written last."""
    index = dest / "model.safetensors.index.json"
    if index.exists():
        return
    _write_surroundings(dest, config)
    weights = Weights(config["num_hidden_layers"], seed)
    shards = _shards(tensors_of(config), shard_bytes)
    with ThreadPoolExecutor(threads) as pool:
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


def _write_shard(dest: Path, shard: _Shard, weights: Weights) -> None:
    random = Random(shard.file)
    with BlockWriter(dest / shard.file, lay_out(shard.entries)) as writer:
        for entry in shard.entries:
            part = Part("data", entry)
            for data in weights.part(entry.name, "raw", part, entry.shape, random):
                writer.write(entry.name, data)
        writer.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dest", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-70b")
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--format", choices=[*FORMATS, "checkpoint"], default="nf4")
    parser.add_argument("--threads", type=int, default=THREADS)
    arguments = parser.parse_args()
    config = config_of(arguments.shape, arguments.layers)
    started = time.perf_counter()
    if arguments.format == "checkpoint":
        write_checkpoint(arguments.dest, config, threads=arguments.threads)
    else:
        write_store(arguments.dest, config, arguments.format, threads=arguments.threads)
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in arguments.dest.glob("*.safetensors"))
    count = sum(prod(entry.shape) for entry in tensors_of(config))
    print(
        f"{arguments.dest}: {size / 1e9:.2f} GB, {count / 1e9:.2f}e9 parameters, in {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
