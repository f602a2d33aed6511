"""Time 4-bit matmuls of few rows on a GPU: our kernel, bitsandbytes', tinygemm, and cuBLAS.

    python benchmarks/matmul.py [--rows 1,2,4,8,16,32,64] [--kinds nf4,int4] [--json FILE]
    python benchmarks/matmul.py --search FILE [--rows 16,32,64] [--kinds nf4]
    python benchmarks/matmul.py --tune STORE

The first prints microseconds of every way, the caches flushed before each call, for the
configurations that a stage would try. `--search` tries many more, compiled by all cores first, saves
every time with its configuration as JSON, and prints the best ones of each size. `--tune` measures
the 4-bit matrices of a store and keeps the fastest way of each for the stages of this machine.
"""

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.runtime.matmul.configs import Codes, Config, bucket, candidates, fits, shared_bytes
from headrace.runtime.matmul.kernel import matmul
from headrace.runtime.matmul.timing import Problem, Timer, dequantized, fused, sample
from headrace.runtime.matmul.tuning import problems, tune
from headrace.runtime.store import Store

SHAPES = ((28672, 8192), (14336, 4096), (4096, 4096))
CUDA = torch.device("cuda")
WAVES = (1, 2, 3, 4, 6, 8, 12)


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
        from bitsandbytes.functional import get_4bit_type

        table = get_4bit_type(codes.kind, device="cuda").float()
    for start in range(0, columns, 1024):
        part = packed[start : start + 1024]
        code = torch.stack((part >> 4, part & 15), dim=-1).view(len(part), depth).int()
        wide = scales[start : start + 1024].repeat_interleave(codes.group, dim=1)
        out[:, start : start + 1024] = x.float() @ (table[code] * wide).T
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
    x: Tensor, codes: Codes, expected: Tensor, configs: Sequence[Config], timer: Timer
) -> Iterator[tuple[float, float, Config]]:
    """(microseconds, relative error, configuration) of those that run."""
    for config in configs:
        try:
            wrong = error(matmul(x, codes, None, config), expected)
            yield timer(lambda config=config: matmul(x, codes, None, config)), wrong, config  # type: ignore[misc]
        except Exception as unable:  # noqa: BLE001 - too large for the device, and worth seeing
            print(f"{config}: {str(unable).splitlines()[0]}")


def compare(kind: str, group: int, shape: tuple[int, int], rows: int) -> dict[str, Any]:
    x, codes = sample(CUDA, Problem(kind, group, *shape, rows, "bfloat16"))
    timer = Timer(CUDA)
    configs = list(candidates(*shape, rows, *limits()))
    runs = [run for run in best(x, codes, reference(x, codes), configs, timer) if run[1] < 0.02]
    micros, wrong, config = min(runs, key=lambda run: run[0])
    dense = torch.randn(shape, dtype=x.dtype, device=CUDA)
    times = {"ours": micros, "unmeasured": runs[0][0]}
    times["cublas bf16"] = timer(lambda: x @ dense.T)
    times["tinygemm"] = tinygemm(x, codes, timer)
    if kind != "int4":
        times["bitsandbytes"] = timer(lambda: fused(x, codes))
        times["dequantize + cublas"] = timer(lambda: dequantized(x, codes, dense))
    moved = codes.packed.nbytes + codes.scales.nbytes
    found = ", ".join(f"{name} {value:.1f}" for name, value in times.items())
    print(
        f"{kind} {shape[0]} x {shape[1]}, {rows:3d} rows: {found} us; ours {moved / micros / 1e3:.0f}"
        f" GB/s, error {wrong:.4f}, {config}",
        flush=True,
    )
    return {"kind": kind, "shape": shape, "rows": rows, "times": times, "config": asdict(config)}


def space(rows: int) -> Iterator[Config]:
    """Tiles worth compiling; splits are chosen by shape."""
    widths = ((32, 2), (32, 4), (64, 4), (128, 4), (128, 8), (256, 8))
    for (columns, warps), words, stages in itertools.product(widths, (16, 32, 64), (2, 3, 4, 5, 6)):
        values = columns * words // warps  # decoded by a thread in a step: registers
        accumulators = columns * bucket(rows) // warps
        wasteful = rows > 32 and columns == 32  # every warp decodes the same codes
        config = Config(columns, words, 1, warps, stages)
        small = shared_bytes(config, rows) <= limits()[1]
        if values <= 1024 and accumulators <= 4096 and small and not wasteful:
            yield config


def split(config: Config, shape: tuple[int, int]) -> Iterator[Config]:
    steps = shape[1] // (8 * config.words)
    tiles = -(-shape[0] // config.columns)
    counts = {max(1, min(round(limits()[0] * waves / tiles), steps // 2)) for waves in WAVES}
    for splits in sorted(counts):
        yield Config(config.columns, config.words, splits, config.warps, config.stages)


def compile_ahead(job: tuple[str, int, int, Config]) -> None:
    """Fill Triton's cache; what is compiled depends on no size but the rows'."""
    kind, group, rows, config = job
    x, codes = sample(CUDA, Problem(kind, group, 1024, 4096, rows, "bfloat16"))
    for splits in (1, 2):
        variant = Config(config.columns, config.words, splits, config.warps, config.stages)
        try:
            matmul(x, codes, None, variant)
        except Exception as unable:  # noqa: BLE001 - shown again when it is timed
            print(f"{config}: {str(unable).splitlines()[0]}", flush=True)


def search(kind: str, group: int, rows: int) -> Iterator[dict[str, Any]]:
    timer = Timer(CUDA)
    for shape in SHAPES:
        x, codes = sample(CUDA, Problem(kind, group, *shape, rows, "bfloat16"))
        configs = [c for tile in space(rows) for c in split(tile, shape) if fits(c, shape[1])]
        runs = sorted(best(x, codes, reference(x, codes), configs, timer), key=lambda run: run[0])
        for micros, wrong, config in runs[:5]:
            print(f"{kind} {shape}, {rows} rows: {micros:.1f} us, error {wrong:.4f}, {config}")
        for micros, wrong, config in runs:
            yield {"kind": kind, "group": group, "shape": shape, "rows": rows, "us": micros,
                   "error": wrong, "config": asdict(config)}  # fmt: skip


def four_bit(store: Store) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Format, block size and shape of each 4-bit matrix or stack of them."""
    for block in store.layers:
        for spec in block.weights.values():
            if spec.format in ("nf4", "fp4") and len(spec.shape) >= 2:
                yield spec.format, spec.blocksize, spec.shape


def run_search(file: Path, kinds: Sequence[str], group: int, rows: Sequence[int]) -> None:
    jobs = [(kind, group, m, tile) for kind in kinds for m in rows for tile in space(m)]
    print(f"compiling {2 * len(jobs)} kernels", flush=True)
    workers = min(16, os.cpu_count() or 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_ahead, jobs, chunksize=1)
    found: list[dict[str, Any]] = []
    for kind, m in itertools.product(kinds, rows):
        found += search(kind, group, m)
        file.write_text(json.dumps(found), encoding="utf-8")  # what there is, if time runs out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help="comma-separated; a search takes 16, 32 and 64")
    parser.add_argument("--kinds", default="nf4")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--json", type=Path, help="where to save the comparison")
    parser.add_argument("--search", type=Path, metavar="FILE")
    parser.add_argument("--tune", type=Path, metavar="STORE")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    given = args.rows or ("16,32,64" if args.search else "1,2,4,8,16,32,64")
    rows = [int(m) for m in given.split(",")]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    if args.tune:
        tune(CUDA, problems(four_bit(Store.open(args.tune)), torch.bfloat16))
        return
    if args.search:
        run_search(args.search, kinds, args.group, rows)
        return
    found = [
        compare(kind, args.group, shape, m)
        for kind, shape, m in itertools.product(kinds, SHAPES, rows)
    ]
    if args.json:
        args.json.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
