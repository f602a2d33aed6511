"""Time paged attention on a GPU, in the shape of a 70B model, against what the device could do.

    python benchmarks/attention.py [--kv-format int8] [--bandwidth 4.0e12] [--compute 8.0e14] [--json FILE]
    python benchmarks/attention.py --search [--kv-format int8] [--cases 1 2] [--json FILE]

Decodes are bound by reading keys and values, prefill by the matrix products of the causal half.
The bounds are measured first: a copy in device memory, and a product of matrices in bf16. Times are
the device's alone, the caches flushed before each call. `--search` also times tiles and splits around
those that are chosen, compiled by all cores first.
"""

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.runtime.attention import launch
from headrace.runtime.attention.softmax import Rule
from headrace.runtime.attention.tiles import DeviceLimits, Tile, shared_bytes
from headrace.runtime.batch import Batch
from headrace.runtime.kv import write_triton
from headrace.runtime.kv.store import KVStore, LayerKV, QuantizedKV
from headrace.runtime.manifest import LayerShape
from headrace.runtime.matmul.timing import Timer
from headrace.runtime.probe import matmul_tflops, memory_gbps
from headrace.scheduler.kv_format import FORMATS, KVFormat
from headrace.scheduler.plan import PAGE_TOKENS, MicroBatch, Slice

HEADS, KV_HEADS, DIM = 64, 8, 128
GROUP = HEADS // KV_HEADS
SHAPE = LayerShape(KV_HEADS, DIM, DIM, 0, 0, 0)
RULE = Rule(DIM**-0.5)
CUDA = torch.device("cuda")
TOLERANCE = 0.02  # relative, of results in bfloat16
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences alike: tokens in pages, and new ones."""

    sequences: int
    past: int
    new: int

    @property
    def is_decode(self) -> bool:
        return self.new <= launch.short_queries(GROUP)

    def moved(self, fmt: KVFormat) -> int:
        """Bytes of keys and values, queries and results, each once."""
        kept = self.sequences * (self.past + self.new) * fmt.page_bytes(KV_HEADS, DIM, DIM)
        return kept // PAGE_TOKENS + 2 * DIM * 2 * self.sequences * self.new * HEADS

    @property
    def flops(self) -> int:
        scores = self.sequences * (self.new * self.past + self.new * (self.new + 1) // 2)
        return 4 * scores * HEADS * DIM

    def __str__(self) -> str:
        return f"{self.sequences:4d} sequences, {self.past:5d} + {self.new:4d} tokens"


CASES = (
    Case(256, 159, 1), Case(256, 1023, 1), Case(128, 4095, 1), Case(16, 4095, 1),
    Case(8, 32767, 1), Case(1, 32767, 1), Case(32, 1016, 8), Case(128, 0, 256), Case(4, 0, 4096),
    Case(1, 30720, 2048),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bytes/s and FLOP/s, of pages in a format."""

    fmt: KVFormat
    bandwidth: float
    compute: float

    def micros(self, case: Case) -> float:
        return max(case.moved(self.fmt) / self.bandwidth, case.flops / self.compute) * 1e6


KV = LayerKV | QuantizedKV


@dataclass(frozen=True, slots=True)
class Inputs:
    """Random queries, keys and values, in pages in random order; `new` keys and values of the batch."""

    q: Tensor
    new: tuple[Tensor, Tensor]
    kv: KV
    batch: Batch

    def attend(self, splits: int | None = None, tile: Tile | None = None) -> Tensor:
        newest = None if isinstance(self.kv, LayerKV) else self.new
        return launch.attend(self.q, self.kv, self.batch, RULE, splits, tile, newest)

    def write(self) -> None:
        """Put new keys and values where they belong, and quantize the pages that they fill."""
        if isinstance(self.kv, LayerKV):
            write_triton.write(*self.new, self.kv, self.batch)
        else:
            write_triton.fill(*self.new, self.kv, self.batch)
            write_triton.keep(*self.new, self.kv, self.batch)

    def choose(self, one: bool, tile: Tile | None = None) -> tuple[Tile, int]:
        return launch.choose(self.q, self.kv, self.batch, RULE, one=one, tile=tile)


@contextmanager
def tensors(case: Case, fmt: KVFormat) -> Iterator[Inputs]:
    pages = -(-(case.past + case.new) // PAGE_TOKENS)
    order = torch.randperm(case.sequences * pages).tolist()
    slices = tuple(
        Slice(
            i, case.past, (0,) * case.new, tuple(order[i * pages : (i + 1) * pages]), None, tail=i
        )
        for i in range(case.sequences)
    )
    batch = Batch.build(MicroBatch(slices), CUDA)
    tails = case.sequences if fmt.is_quantized else 0
    with KVStore({0: SHAPE}, case.sequences * pages, torch.bfloat16, CUDA, fmt, tails) as store:
        kv = store.layer(0)
        fill_randomly(kv)
        q = torch.randn(case.sequences * case.new, HEADS, DIM, dtype=torch.bfloat16, device=CUDA)
        new = q[:, :KV_HEADS].contiguous(), q[:, -KV_HEADS:].contiguous()
        yield Inputs(q, new, kv, batch)


def fill_randomly(kv: KV) -> None:
    if isinstance(kv, LayerKV):
        kv.k.normal_()
        kv.v.normal_()
        return
    for side in (kv.k, kv.v):
        side.codes.random_()
        side.scales.uniform_(0.01, 0.02)
        side.tails.normal_()


def measure(case: Case, bounds: Bounds, timer: Timer) -> dict[str, Any]:
    with tensors(case, bounds.fmt) as inputs:
        tile, splits = inputs.choose(case.is_decode)
        micros = timer(inputs.attend)
        writing = timer(inputs.write)
    share = bounds.micros(case) / micros
    print(
        f"{case}: attend {micros:8.1f} us, {case.moved(bounds.fmt) / micros / 1e3:7.0f} GB/s, "
        f"{case.flops / micros / 1e6:6.1f} TFLOP/s, {share:5.0%} of the bound; "
        f"write {writing:6.1f} us; {splits} splits, {tile}",
        flush=True,
    )
    return {"case": asdict(case), "us": micros, "share": share, "write_us": writing,
            "tile": asdict(tile), "splits": splits}  # fmt: skip


def tiles(decode: bool, fmt: KVFormat) -> Iterator[Tile]:
    """Tiles worth compiling, that fit the device. Codes leave room for more of them in flight."""
    limits = DeviceLimits.of(CUDA)
    stages = (2, 3, 4, 6) if fmt.is_quantized else (2, 3, 4) if decode else (2, 3)
    found: Iterator[Tile]
    if decode:
        found = (
            Tile(16, keys, DIM, DIM, warps, depth, peel=False)
            for keys, warps, depth in itertools.product((32, 64, 128), (2, 4, 8), stages)
        )
    else:
        found = (
            Tile(rows, keys, DIM, DIM, max(4, rows // 16), depth, peel)
            for rows, keys, depth, peel in itertools.product(
                (32, 64, 128, 256), (32, 64, 128), stages, (False, True)
            )
        )
    return (
        tile for tile in found if shared_bytes(tile, 2, limits, fmt.bits) <= limits.shared_memory
    )


def around(tile: Tile, splits: int) -> list[int]:
    """Splits worth timing where `splits` are chosen; blocks of many rows are not split."""
    if tile.rows > 64:
        return [splits]
    return sorted({1, max(1, splits // 2), splits, splits * 3 // 2, splits * 2})


def compile_ahead(job: tuple[bool, Tile, str]) -> None:
    """Fill Triton's cache; what is compiled depends on no size but the tile's."""
    decode, tile, fmt = job
    with tensors(Case(2, 64, 1 if decode else 8), FORMATS[fmt]) as inputs:
        for splits in (1, 2) if tile.rows <= 64 else (1,):
            run(inputs, splits, tile)


def run(inputs: Inputs, splits: int, tile: Tile) -> Tensor | None:
    """None if the device cannot take the tile."""
    from triton.runtime.errors import OutOfResources

    try:
        return inputs.attend(splits, tile)
    except OutOfResources:
        return None


def search(case: Case, bounds: Bounds, timer: Timer) -> Iterator[dict[str, Any]]:
    """Every tile and split that runs, fastest first."""
    found: list[tuple[float, float, int, Tile]] = []
    with tensors(case, bounds.fmt) as inputs:
        expected = inputs.attend().float()
        for tile in tiles(case.is_decode, bounds.fmt):
            _, chosen = inputs.choose(case.is_decode, tile)
            for splits in around(tile, chosen):
                out = run(inputs, splits, tile)
                if out is None:
                    continue
                error = float((out.float() - expected).norm() / expected.norm())
                work = (inputs, splits, tile)
                micros = timer(lambda work=work: run(*work), repeats=7)  # type: ignore[misc]
                found.append((micros, error, splits, tile))
    for rank, (micros, error, splits, tile) in enumerate(sorted(found, key=lambda run: run[0])):
        share, wrong = bounds.micros(case) / micros, "" if error < TOLERANCE else " WRONG"
        if rank < SHOWN or wrong:
            print(f"    {micros:8.1f} us, {share:5.0%}, error {error:.4f}{wrong}, "
                  f"{splits} splits, {tile}", flush=True)  # fmt: skip
        yield {"us": micros, "share": share, "error": error, "splits": splits,
               "tile": asdict(tile)}  # fmt: skip


def prepare(fmt: KVFormat, cases: Sequence[Case]) -> None:
    kinds = sorted({case.is_decode for case in cases})
    jobs = [(decode, tile, fmt.name) for decode in kinds for tile in tiles(decode, fmt)]
    print(f"compiling {len(jobs)} tiles", flush=True)
    workers = min(16, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_ahead, jobs, chunksize=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv-format", choices=["bf16", "int8", "int4"], default="bf16")
    parser.add_argument("--bandwidth", type=float, help="bytes/s; measured when left out")
    parser.add_argument("--compute", type=float, help="FLOP/s; measured when left out")
    parser.add_argument("--search", action="store_true", help="time other tiles and splits too")
    parser.add_argument(
        "--cases", type=int, nargs="+", help="numbers of cases, from 0; all of them"
    )
    parser.add_argument("--json", type=Path, help="where to save all times")
    args = parser.parse_args()
    cases = [CASES[i] for i in args.cases] if args.cases else CASES
    bounds = Bounds(
        FORMATS[args.kv_format],
        args.bandwidth or memory_gbps(CUDA) * 1e9,
        args.compute or matmul_tflops(CUDA, torch.bfloat16) * 1e12,
    )
    print(
        f"{torch.cuda.get_device_name()}: {bounds.bandwidth / 1e9:.0f} GB/s, "
        f"{bounds.compute / 1e12:.0f} TFLOP/s"
    )
    if args.search:
        prepare(bounds.fmt, cases)
    timer = Timer(CUDA)
    found: list[dict[str, Any]] = []
    for case in cases:
        found.append(measure(case, bounds, timer))
        if args.search:
            found[-1]["runs"] = list(search(case, bounds, timer))
        if args.json:  # what there is, if time runs out
            args.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
