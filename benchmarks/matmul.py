"""Time 4-bit matmuls of few rows on a GPU: our kernel, bitsandbytes', tinygemm, and cuBLAS.

    python benchmarks/matmul.py [--rows 1,2,4,8,16,32,64,128] [--kinds nf4,int4] [--json FILE]
    python benchmarks/matmul.py --group [--rows 1,8,16,32,64,128]
    python benchmarks/matmul.py --search FILE [--rows 8,16,32,64,128] [--kinds nf4]
    python benchmarks/matmul.py --tune STORE [--decodes 128]

The first prints microseconds of every way, the caches flushed before each call; "default" is our
kernel as it runs where nothing was measured, "tuned" the fastest that a stage tries when it starts.
`--group` compares one launch for all weights that multiply the same rows with one for each.
`--search` tries many more configurations, compiled by all cores first, saves every time with its
configuration as JSON, and prints the best ones of each size. `--tune` measures the 4-bit products of
a store as a stage that has all layers would, and says how long it took.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from headrace.runtime.matmul.configs import (
    Codes,
    Config,
    Problem,
    Product,
    bucket,
    candidates,
    fits,
    shared_bytes,
)
from headrace.runtime.matmul.kernel import compile_ahead, matmul, matmuls
from headrace.runtime.matmul.timing import Timer, dequantized, fused, sample
from headrace.runtime.matmul.tuning import choices, problems, tune
from headrace.runtime.model import StageModel
from headrace.runtime.store import Store

SHAPES = ((28672, 8192), (14336, 4096), (4096, 4096))
CUDA = torch.device("cuda")
GROUPS = (((4096, 1024, 1024), 4096), ((14336, 14336), 4096))
"""q, k and v, and gate and up, of a Llama of 8B."""

SEARCHED = (*SHAPES, (6144, 4096), (28672, 4096), (4096, 14336))
"""And what such a Llama multiplies in one launch."""

WAVES = (1, 2, 4, 8)


def limits() -> tuple[int, int]:
    """Multiprocessors, and shared memory that one program may have."""
    found = torch.cuda.get_device_properties(CUDA)
    return found.multi_processor_count, found.shared_memory_per_block_optin  # type: ignore[attr-defined]


def reference(x: Tensor, codes: Codes) -> Tensor:
    """The product in float32 with float32 weights, some rows of the weight at a time."""
    columns, depth = codes.shape
    packed, scales = codes.packed.view(columns, -1), codes.scales.view(columns, -1)
    out = torch.empty(len(x), columns, device=CUDA)
    table = torch.tensor(range(-8, 8), device=CUDA).float()
    if codes.kind != "int4":
        from headrace.runtime.bnb import functional

        table = functional.get_4bit_type(codes.kind, device="cuda").float()
    for start in range(0, columns, 1024):
        part = packed[start : start + 1024]
        code = torch.stack((part >> 4, part & 15), dim=-1).view(len(part), depth).int()
        wide = scales[start : start + 1024].float().repeat_interleave(codes.group, dim=1)
        values = table[code]
        if codes.zeros is not None:
            zeros = codes.zeros.view(columns, -1)[start : start + 1024]
            values += 8 - zeros.float().repeat_interleave(codes.group, dim=1)
        out[:, start : start + 1024] = x.float() @ (values * wide).T
    return out


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected).norm() / expected.norm())


def tinygemm(x: Tensor, codes: Codes, timer: Timer) -> float:
    """torch's own int4 kernel, in its own layout; its values are other ones. NaN if it cannot."""
    columns, depth = codes.shape
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack(
            codes.packed.view(columns, depth // 2), 8
        )
        shape = (depth // codes.group, columns, 2)
        scales = torch.ones(shape, dtype=torch.bfloat16, device=CUDA)
        run = torch.ops.aten._weight_int4pack_mm
        return timer(lambda: run(x, packed, codes.group, scales))
    except RuntimeError as unable:
        print(f"tinygemm: {str(unable).splitlines()[0]}")
        return float("nan")


def best(
    x: Tensor, codes: Codes, expected: Tensor, configs: Iterable[Config], timer: Timer
) -> Iterator[tuple[float, float, Config]]:
    """(microseconds, relative error, configuration) of those that fit the device."""
    for config in configs:
        try:
            wrong = error(matmul(x, codes, None, config), expected)
        except OutOfResources as unable:
            print(f"{config}: {unable}")
            continue
        yield timer(lambda config=config: matmul(x, codes, None, config)), wrong, config  # type: ignore[misc]


def compare(kind: str, group: int, shape: tuple[int, int], rows: int) -> dict[str, Any]:
    x, codes = sample(CUDA, Problem(kind, group, *shape, rows, "bfloat16"))
    timer = Timer(CUDA)
    configs = list(candidates(*shape, rows, *limits()))
    runs = [run for run in best(x, codes, reference(x, codes), configs, timer) if run[1] < 0.02]
    micros, wrong, config = min(runs, key=lambda run: run[0])
    dense = torch.randn(shape, dtype=x.dtype, device=CUDA)
    times = {"default": runs[0][0], "tuned": micros}
    times["cublas bf16"] = timer(lambda: x @ dense.T)
    times["tinygemm"] = tinygemm(x, codes, timer)
    if kind != "int4":
        times["bitsandbytes"] = timer(lambda: fused(x, codes))
        times["dequantize + cublas"] = timer(lambda: dequantized(x, codes, dense))
    moved = codes.packed.nbytes + codes.scales.nbytes
    found = ", ".join(f"{name} {value:.1f}" for name, value in times.items())
    print(
        f"{kind} {shape[0]} x {shape[1]}, {rows:3d} rows: {found} us; tuned {moved / micros / 1e3:.0f}"
        f" GB/s, error {wrong:.4f}, {config}",
        flush=True,
    )
    return {"kind": kind, "shape": shape, "rows": rows, "times": times, "config": asdict(config)}


def default(codes: Codes, columns: int, rows: int) -> Config:
    return next(candidates(columns, codes.shape[1], rows, *limits()))


def compare_group(kind: str, group: int, widths: Sequence[int], depth: int, rows: int) -> None:
    """Weights that multiply the same rows: one launch for all, and one for each."""
    made = [sample(CUDA, Problem(kind, group, n, depth, rows, "bfloat16")) for n in widths]
    x, weights = made[0][0], [codes for _, codes in made]
    timer = Timer(CUDA)
    shared = default(weights[0], sum(widths), rows)
    own = [default(codes, codes.shape[0], rows) for codes in weights]
    together = timer(lambda: matmuls(x, weights, None, shared))
    apart = timer(lambda: [matmul(x, c, None, how) for c, how in zip(weights, own, strict=True)])
    size = "+".join(map(str, widths))
    print(
        f"{kind} {size} x {depth}, {rows:3d} rows: together {together:.1f}, apart {apart:.1f} us, "
        f"{shared}",
        flush=True,
    )


def space(rows: int) -> Iterator[Config]:
    """Tiles worth compiling; splits are chosen by shape."""
    widths = ((32, 2), (64, 4), (128, 4), (128, 8), (256, 8))
    for (columns, warps), words, stages in itertools.product(widths, (16, 32, 64), (2, 3, 4)):
        values = columns * words // warps  # decoded by a thread in a step: registers
        accumulators = columns * bucket(rows) // warps
        wasteful = rows > 32 and columns == 32  # every warp decodes the same codes
        config = Config(columns, words, 1, warps, stages)
        small = shared_bytes(config, rows) <= limits()[1]
        fewest = 256 if rows > 64 else 512
        if fewest <= values <= 1024 and accumulators <= 4096 and small and not wasteful:
            yield config


def split(config: Config, shape: tuple[int, int]) -> Iterator[Config]:
    steps = shape[1] // (8 * config.words)
    tiles = -(-shape[0] // config.columns)
    counts = {max(1, min(round(limits()[0] * waves / tiles), steps // 2)) for waves in WAVES}
    for splits in sorted(counts):
        yield replace(config, splits=splits)


def compile_one(job: tuple[Problem, Config]) -> None:
    """Fill Triton's cache, for one part of K and for several."""
    problem, config = job
    zeros, scales = problem.has_zeros, problem.scales
    columns, depth = (problem.columns,), problem.depth
    product = Product(problem.kind, problem.group, columns, depth, False, zeros, scales)
    jobs = [(product, problem.rows, replace(config, splits=splits)) for splits in (1, 2)]
    compile_ahead(CUDA, jobs, torch.bfloat16, 1)


def search(kind: str, group: int, rows: int) -> Iterator[dict[str, Any]]:
    timer = Timer(CUDA)
    for shape in SEARCHED:
        x, codes = sample(CUDA, Problem(kind, group, *shape, rows, "bfloat16"))
        configs = [c for tile in space(rows) for c in split(tile, shape) if fits(c, shape[1])]
        runs = sorted(best(x, codes, reference(x, codes), configs, timer), key=lambda run: run[0])
        for micros, wrong, config in runs[:5]:
            print(f"{kind} {shape}, {rows} rows: {micros:.1f} us, error {wrong:.4f}, {config}")
        for micros, wrong, config in runs:
            yield {"kind": kind, "group": group, "shape": shape, "rows": rows, "us": micros,
                   "error": wrong, "config": asdict(config)}  # fmt: skip


def compile_all(jobs: Sequence[tuple[Problem, Config]]) -> None:
    print(f"compiling {2 * len(jobs)} kernels", flush=True)
    workers = min(16, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_one, jobs, chunksize=1)


def compile_jobs(
    kind: str, group: int, rows: int, configs: Iterable[Config]
) -> list[tuple[Problem, Config]]:
    """What is to be compiled, which depends on no size but the rows'."""
    problem = Problem(kind, group, 1024, 4096, rows, "bfloat16")
    return [(problem, tile) for tile in {replace(config, splits=1) for config in configs}]


def run_comparison(kinds: Sequence[str], group: int, rows: Sequence[int]) -> list[dict[str, Any]]:
    jobs = [
        job
        for kind, m in {(kind, bucket(m)) for kind in kinds for m in rows}
        for job in compile_jobs(
            kind, group, m, (c for shape in SHAPES for c in candidates(*shape, m, *limits()))
        )
    ]
    compile_all(jobs)
    return [
        compare(kind, group, shape, m) for kind, shape, m in itertools.product(kinds, SHAPES, rows)
    ]


def run_search(file: Path, kinds: Sequence[str], group: int, rows: Sequence[int]) -> None:
    compile_all(
        [job for kind in kinds for m in rows for job in compile_jobs(kind, group, m, space(m))]
    )
    found: list[dict[str, Any]] = []
    for kind, m in itertools.product(kinds, rows):
        found += search(kind, group, m)
        file.write_text(json.dumps(found), encoding="utf-8")  # what there is, if time runs out


def run_tune(path: Path, decodes: int) -> None:
    store = Store.open(path)
    layers, dtype = range(len(store.layers)), torch.bfloat16
    model = StageModel(
        store, layers, device=CUDA, dtype=dtype, with_embedding=False, with_head=False
    )
    products = model.four_bit_products()
    started = time.perf_counter()
    tune(CUDA, products, decodes, dtype)
    print(f"{time.perf_counter() - started:.1f} s")
    known = choices(torch.device("cuda", torch.cuda.current_device()))
    for product, p in problems(products, decodes, dtype):
        choice = known.choose(p.kind, p.group, (p.columns, p.depth), p.rows, dtype)
        print(f"{product}, {p.rows} rows: {choice}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help="comma-separated")
    parser.add_argument("--kinds", default="nf4")
    parser.add_argument("--blocksize", type=int, default=64, help="elements of a scale")
    parser.add_argument("--json", type=Path, help="where to save the comparison")
    parser.add_argument("--group", action="store_true")
    parser.add_argument("--search", type=Path, metavar="FILE")
    parser.add_argument("--tune", type=Path, metavar="STORE")
    parser.add_argument("--decodes", type=int, default=128, help="of a micro-batch, to tune for")
    args = parser.parse_args()
    kinds, group = args.kinds.split(","), args.blocksize
    given = args.rows or ("8,16,32,64,128" if args.search else "1,2,4,8,16,32,64,128")
    rows = [int(m) for m in given.split(",")]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if args.tune:
        run_tune(args.tune, args.decodes)
    elif args.search:
        run_search(args.search, kinds, group, rows)
    elif args.group:
        for kind, (widths, depth), m in itertools.product(kinds, GROUPS, rows):
            compare_group(kind, group, widths, depth, m)
    else:
        found = run_comparison(kinds, group, rows)
        if args.json:
            args.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
