"""How fast stores go to a cold tier and back, what they take there, and what that costs of a processor.

    python benchmarks/cold_tier.py FOLDER --layers 8

Makes two stores of random normal weights in FOLDER, in bf16 and NF4, if they are not there, pushes each to a
directory beside it and to memory, and pulls it back. MB are 10^6 bytes of the store. "CPU" is the processor
time of all threads: where it is near the wall time times the cores, that is what binds.
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from headrace.runtime.cold.chunks import cut_block
from headrace.runtime.cold.codec import decode, encode
from headrace.runtime.cold.objects import hash_of
from headrace.runtime.cold.pull import pull
from headrace.runtime.cold.push import push
from headrace.runtime.cold.source import ColdModel
from headrace.runtime.conversion.convert import convert
from headrace.runtime.store import Store


def make_stores(folder: Path, layers: int) -> list[Path]:
    """bf16 and NF4 of the same weights."""
    stores = [folder / "bf16", folder / "nf4"]
    if all((store / "headrace.json").exists() for store in stores):
        return stores
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=4000,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "checkpoint")
    for store, fmt in zip(stores, ("keep", "nf4"), strict=True):
        convert(folder / "checkpoint", store, format=fmt, allow_missing_tokenizer=True)
    shutil.rmtree(folder / "checkpoint")
    return stores


def measure(table: Table, name: str, nbytes: int, work: Callable[[], str]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    note = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    speed, cost = f"{nbytes / wall / 1e6:.0f}", f"{nbytes / cpu / 1e6:.0f}"
    table.add_row(name, speed, cost, f"{wall:.1f}", note)


def transfers(store: Store, folder: Path) -> Table:
    table = Table(store.path.name, "MB/s", "MB a CPU second", "seconds", "")
    size = store.nbytes
    tier = (folder / "tier").as_uri()
    for name, url in (("directory", tier), ("memory", f"memory://{store.path.name}")):
        model, back = ColdModel(url, store.path.name), folder / "back"
        shutil.rmtree(folder / "tier", ignore_errors=True)
        shutil.rmtree(back, ignore_errors=True)

        def send(model: ColdModel = model) -> str:
            report = push(store.path, model)
            return f"{report.stored / report.nbytes:.1%} of its bytes in {report.objects} objects"

        def bring(model: ColdModel = model, back: Path = back) -> str:
            return f"{pull(model, back).fetched / 1e6:.0f} MB"

        measure(table, f"push to a {name}", size, send)
        measure(table, "push again", size, send)
        measure(table, f"pull from a {name}", size, bring)
    return table


def steps(store: Store, count: int) -> Table:
    """One thread, one chunk after the other."""
    table = Table(f"{store.path.name}, one thread", "MB/s", "MB a CPU second", "seconds", "")
    pieces = []
    for block in store.layers:
        content = block.file.read_bytes()
        cuts = cut_block(block)[1:]
        pieces += [(content[c.offset : c.offset + c.nbytes], c.runs) for c in cuts]
        if sum(len(data) for data, _ in pieces) > count:
            break
    size = sum(len(data) for data, _ in pieces)
    stored: list[bytes] = []

    def compress() -> str:
        stored.extend(encode(data, runs) for data, runs in pieces)
        return f"{sum(map(len, stored)) / size:.1%}"

    def write() -> str:
        for data in stored:
            with open(store.path / "scratch.tmp", "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
        os.unlink(store.path / "scratch.tmp")
        return f"{len(stored)} files"

    measure(
        table, "xxh3_64", size, lambda: str([xxhash.xxh3_64(d).digest() for d, _ in pieces])[:0]
    )
    measure(table, "sha256", size, lambda: str([hash_of(data) for data, _ in pieces])[:0])
    measure(table, "encode", size, compress)
    decoding = zip(stored, (len(data) for data, _ in pieces), strict=False)
    measure(table, "decode", size, lambda: str(sum(len(decode(s, n)) for s, n in decoding))[:0])
    measure(table, "write and fsync", size, write)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Stores to a cold tier and back.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    for path in make_stores(given.folder, given.layers):
        store = Store.open(path)
        console.print(steps(store, 100_000_000))
        console.print(transfers(store, given.folder))


if __name__ == "__main__":
    main()
