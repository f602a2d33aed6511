"""Which way a 4-bit matmul of few rows is fastest: measured on the device once, kept in a file.

Three ways lead to the product: our kernel in one of its configurations, bitsandbytes' fused one, or
dequantizing and cuBLAS. Where nothing was measured, few rows go to our kernel on devices like the one
that it was tried on. `tune` measures when it is asked to, never while a stage runs.
"""

import fcntl
import hashlib
import json
import logging
import os
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from headrace.runtime.dtypes import name_of
from headrace.runtime.matmul.configs import (
    BUCKETS,
    TABLES,
    Config,
    Problem,
    Product,
    bucket,
    candidates,
    supports,
)
from headrace.runtime.matmul.timing import Choice, fastest

log = logging.getLogger(__name__)

VERSION = 3
"""Of the cache file; what other kernels measured is measured again."""

LEAST_ELEMENTS = 1 << 20
"""Smaller weights take no time worth measuring."""

KERNEL_MAJOR = 9
"""From this compute capability on, our kernel is taken without a measurement: on an H200 it is the
fastest, also with the first tile that fits (28672 x 8192: 73 us for 4 rows, 83 for 16, 119 for 64 and
182 for 128; by bitsandbytes 374, 376, 366 and 385). Older devices were not measured."""

COMPILERS = 8
"""Threads that compile at once."""

FUSED_ROWS = 4
"""Otherwise, without a measurement up to this many rows bitsandbytes' fused kernel is taken: it is no
slower than dequantizing and multiplying (107 against 375 us for one row on an H200, 374 for four)."""


class Choices:
    """The ways for one device, from what was measured."""

    def __init__(
        self,
        processors: int,
        shared: int,
        measured: dict[Problem, Choice],
        by_default: bool = False,
    ) -> None:
        self._processors = processors
        self._shared = shared
        self._by_default = by_default
        self._measured = measured
        self._chosen: dict[tuple[str, int, tuple[int, ...], int, torch.dtype], Choice] = {}

    @property
    def runs(self) -> bool:
        """Whether our kernel runs on the device."""
        return self._shared > 0

    @classmethod
    def of(cls, device: torch.device, measured: dict[Problem, Choice]) -> "Choices":
        """For a CUDA device; without Triton or before compute capability 8.0 our kernel is none."""
        found = torch.cuda.get_device_properties(device)
        runs = found.major >= 8 and _has_triton()
        shared: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
        if not runs:
            return cls(found.multi_processor_count, 0, {})
        by_default = found.major >= KERNEL_MAJOR
        return cls(found.multi_processor_count, shared, measured, by_default)

    def choose(
        self, kind: str, group: int, shape: tuple[int, ...], rows: int, dtype: torch.dtype
    ) -> Choice:
        """For x of `rows` rows times a weight [N, K]; the same answer every time."""
        key = (kind, group, shape, rows, dtype)
        if key not in self._chosen:
            self._chosen[key] = self._choice(*key)
        return self._chosen[key]

    def _choice(
        self, kind: str, group: int, shape: tuple[int, ...], rows: int, dtype: torch.dtype
    ) -> Choice:
        if supports(group, shape[1], rows, dtype):
            name = name_of(dtype)
            problem = Problem(kind, group, shape[0], shape[1], bucket(rows), name)
            choice = self._measured.get(problem)
            if choice is not None and choice.path != "dense":
                return choice
            tried = self.candidates(problem)
            if choice is None and self._by_default and tried:
                return Choice("kernel", tried[0])
        # bitsandbytes has a kernel for the fewest rows, which a bucket's measurement does not see.
        fused = kind in TABLES and rows <= FUSED_ROWS and shape[1] % group == 0
        return Choice("bitsandbytes" if fused else "dense")

    def adopt(self, measured: dict[Problem, Choice]) -> None:
        """Choose by these measurements from now on."""
        if self._shared:
            self._measured = measured
            self._chosen.clear()

    def candidates(self, problem: Problem) -> list[Config]:
        """The configurations of our kernel that are worth measuring for a problem."""
        size = (problem.columns, problem.depth, problem.rows)
        return list(candidates(*size, self._processors, self._shared))


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def choices(device: torch.device) -> Choices:
    """The ways for a CUDA device, read once; `tune` adds to them."""
    return Choices.of(device, load(_cache_file(device)))


def tune(
    device: torch.device, products: Collection[Product], rows: int, dtype: torch.dtype
) -> None:
    """Measure what the cache file lacks of products with at most `rows` rows, and compile what they
    will run. One process of a machine measures, others wait.

    Takes seconds the first time, to compile and to measure, and device memory for the largest weight
    in 4-bit and in 16-bit form, which is free again afterwards. Where it fails, the reason is
    logged and the choices stay what they were.
    """
    device = torch.empty(0, device=device).device  # with its index, as tensors have it
    known, threads = choices(device), min(COMPILERS, os.cpu_count() or 1)
    if not known.runs:
        return
    from headrace.runtime.matmul.kernel import compile_ahead

    try:
        wanted = {p for _, p in problems(products, rows, dtype)}
        _measure(device, {p for p in wanted if p.columns * p.depth >= LEAST_ELEMENTS}, threads)
        chosen = (
            (product, p.rows, known.choose(p.kind, p.group, (p.columns, p.depth), p.rows, dtype))
            for product, p in problems(products, rows, dtype)
        )
        jobs = [(product, m, how.config) for product, m, how in chosen if how.config is not None]
        compile_ahead(device, jobs, dtype, threads)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        log.warning("4-bit matmuls were not measured: %s", error)
    torch.cuda.empty_cache()


def _measure(device: torch.device, wanted: set[Problem], threads: int) -> None:
    file = _cache_file(device)
    with _alone(file):
        measured = load(file)
        missing = sorted(wanted - measured.keys(), key=lambda p: (p.rows, p.columns, p.depth))
        if missing:
            measured |= _measured(device, missing, threads)
            save(file, measured)
    choices(device).adopt(measured)


def _measured(
    device: torch.device, problems: Sequence[Problem], threads: int
) -> dict[Problem, Choice]:
    """How to solve problems of one type of values."""
    from headrace.runtime.matmul.kernel import compile_ahead

    started, known = time.perf_counter(), choices(device)
    tried = {problem: known.candidates(problem) for problem in problems}
    jobs = [
        (
            Product(p.kind, p.group, (p.columns,), p.depth, False, p.has_zeros, p.scales),
            p.rows,
            config,
        )
        for p in problems
        for config in tried[p]
    ]
    compile_ahead(device, jobs, getattr(torch, problems[0].dtype), threads)
    compiled, found = time.perf_counter(), {}
    failed: RuntimeError | None = None
    for problem in problems:
        try:
            found[problem] = fastest(device, problem, tried[problem])
        except RuntimeError as error:  # no device memory for it, most of all
            failed = error
        else:
            log.debug("%s: %s", problem, found[problem])
    if failed is not None:
        missing, reason = len(problems) - len(found), str(failed).splitlines()[0]
        log.warning("%d sizes of 4-bit matmuls were not measured: %s", missing, reason)
    ended = time.perf_counter()
    text = "measured %d sizes of 4-bit matmuls in %.1f s, after %.1f s for compiling"
    log.info(text, len(found), ended - compiled, compiled - started)
    return found


def problems(
    products: Iterable[Product], rows: int, dtype: torch.dtype
) -> Iterator[tuple[Product, Problem]]:
    """Products with every number of rows up to `rows`, as far as there is a kernel for them.

    Several weights take as long as one with the columns of all.
    """
    sizes = [size for size in BUCKETS if size <= bucket(min(rows, BUCKETS[-1]))]
    name = name_of(dtype)
    for product in products:
        kind, group, depth = product.kind, product.group, product.depth
        for size in sizes:
            if supports(group, depth, size, dtype):
                yield product, Problem(kind, group, sum(product.widths), depth, size, name)


def _cache_file(device: torch.device) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    versions = ""
    if _has_triton():
        import triton

        versions = f"{torch.__version__} {triton.__version__}"
    identity = f"{torch.cuda.get_device_name(device)} {versions} {VERSION}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Path(base) / "headrace" / f"matmul-{digest}.json"


def load(file: Path) -> dict[Problem, Choice]:
    """What was measured; nothing when there is no such file or it cannot be read."""
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
        return {Problem(**r["problem"]): _choice(r["choice"]) for r in records}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: not usable (%s), measuring again", file, error)
        return {}


def _choice(record: dict[str, Any]) -> Choice:
    config = record["config"]
    return Choice(record["path"], config and Config(**config), record["microseconds"])


def save(file: Path, measured: dict[Problem, Choice]) -> None:
    """Written whole or not at all; the lock is held."""
    records = [{"problem": asdict(p), "choice": asdict(c)} for p, c in measured.items()]
    temporary = file.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(records, indent=1), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        log.warning("%s: cannot be written (%s): every start measures again", file, error)


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Holds a lock beside `file`; where none can be had, goes on without."""
    lock = None
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.with_suffix(".lock").open("w")
    if lock is None:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
