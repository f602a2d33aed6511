"""Which way a 4-bit matmul of few rows is fastest: measured on the device once, kept in a file.

Three ways lead to the product: our kernel in one of its configurations, bitsandbytes' fused one, or
dequantizing and cuBLAS. What was not measured is chosen by a fixed rule, so that results do not
depend on when something was measured in a run. Nothing is measured while a pass runs.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from headrace.runtime.matmul_configs import (
    BUCKETS,
    Codes,
    Config,
    bucket,
    candidates,
    supports,
)

log = logging.getLogger(__name__)

VERSION = 1
"""Of the cache file; what other kernels measured is measured again."""

LEAST_ELEMENTS = 1 << 20
"""Smaller weights take no time worth measuring."""

FUSED_ROWS = 4
"""Without a measurement, and without our kernel: up to this many rows bitsandbytes' fused one is no
slower than dequantizing and multiplying (107 against 375 us for one row on an H200, 374 for four)."""

KERNEL_ROWS = 64
"""Without a measurement: up to this many rows our kernel is taken."""

TOLERANCE = 0.02
"""Relative error of a product, in bfloat16, beyond which a configuration is not used."""

REPEATS = 15
FLUSH_BYTES = 256 << 20  # more than any device caches

Path_ = Literal["kernel", "bitsandbytes", "dense"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Products that take the same time: weights [N, K] of one format, by rows of at most `rows`.

    `kind` is "nf4" or "fp4": affine codes are stored by no format that can be loaded yet.
    """

    kind: str
    group: int
    columns: int
    depth: int
    rows: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Choice:
    """How to multiply; `config` is our kernel's. `microseconds` is what it took, 0 if not measured."""

    path: Path_
    config: Config | None = None
    microseconds: float = 0.0


class Choices:
    """The ways for one device, from what was measured."""

    def __init__(self, device: torch.device, measured: dict[Problem, Choice]) -> None:
        found = torch.cuda.get_device_properties(device)
        self._processors: int = found.multi_processor_count
        self._shared: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
        self._runs = found.major >= 8 and _has_triton()
        self._measured = measured
        self._chosen: dict[tuple[str, int, tuple[int, ...], int, torch.dtype], Choice] = {}

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
            name = str(dtype).removeprefix("torch.")
            problem = Problem(kind, group, shape[0], shape[1], bucket(rows), name)
            choice = self._measured.get(problem) or self._rule(problem)
            if choice.path != "dense":
                return choice
        # bitsandbytes has a kernel for the fewest rows, which a bucket's measurement does not see.
        fused = rows <= FUSED_ROWS and shape[1] % group == 0
        return Choice("bitsandbytes" if fused else "dense")

    def candidates(self, problem: Problem) -> list[Config]:
        """What our kernel can do for a problem; the first without measuring."""
        if not self._runs:
            return []
        size = (problem.columns, problem.depth, problem.rows)
        return list(candidates(*size, self._processors, self._shared))

    def _rule(self, problem: Problem) -> Choice:
        configs = self.candidates(problem) if problem.rows <= KERNEL_ROWS else []
        return Choice("kernel", configs[0]) if configs else Choice("dense")


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def choices(device: torch.device) -> Choices:
    """The ways for a CUDA device, read once; `tune` reads them again."""
    return Choices(device, _load(_cache_file(device)))


def tune(device: torch.device, problems: Iterable[Problem]) -> None:
    """Measure the problems that the cache file lacks. One process of a machine does, others wait.

    Takes a minute the first time, mostly for compiling; and device memory for the largest weight in
    4-bit and in 16-bit form, which is free again afterwards.
    """
    wanted = {p for p in problems if p.columns * p.depth >= LEAST_ELEMENTS}
    file = _cache_file(device)
    measured = _load(file)
    if not _has_triton() or wanted <= measured.keys():
        return
    with _alone(file):
        measured = _load(file)
        known = Choices(device, {})
        for problem in sorted(wanted - measured.keys(), key=lambda p: (p.columns, p.depth, p.rows)):
            measured[problem] = fastest(device, problem, known.candidates(problem))
            log.info("%s: %s", problem, measured[problem])
        _save(file, measured)
    torch.cuda.empty_cache()
    choices.cache_clear()


def problems(
    weights: Iterable[tuple[str, int, tuple[int, ...]]], dtype: torch.dtype
) -> Iterator[Problem]:
    """Every problem of 4-bit weights (kind, group, shape [..., N, K]) that has a kernel."""
    for kind, group, (*_, columns, depth) in weights:
        for rows in BUCKETS:
            if supports(group, depth, rows, dtype):
                name = str(dtype).removeprefix("torch.")
                yield Problem(kind, group, columns, depth, rows, name)


def sample(device: torch.device, problem: Problem) -> tuple[Tensor, Codes]:
    """Random rows and a random weight of a problem's size."""
    columns, depth = problem.columns, problem.depth
    generator = torch.Generator(device).manual_seed(0)

    def ints(count: int, high: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(high, (count,), generator=generator, device=device, dtype=dtype)

    scales = torch.rand(columns * depth // problem.group, generator=generator, device=device)
    codes = Codes(
        problem.kind,
        ints(columns * depth // 2, 256, torch.uint8),
        scales + 0.1,
        problem.group,
        (columns, depth),
    )
    x = torch.randn(problem.rows, depth, generator=generator, device=device)
    return x.to(getattr(torch, problem.dtype)), codes


def fastest(device: torch.device, problem: Problem, configs: Iterable[Config]) -> Choice:
    """The fastest way for a problem, of those that give the right product."""
    from triton.runtime.errors import TritonError

    from headrace.runtime.matmul_4bit import matmul

    x, codes = sample(device, problem)
    timer = Timer(device)
    dense = torch.empty(codes.shape, dtype=x.dtype, device=device)
    found = [
        Choice("dense", None, timer(lambda: dequantized(x, codes, dense))),
        Choice("bitsandbytes", None, timer(lambda: fused(x, codes))),
    ]
    expected = dequantized(x, codes, dense)
    for config in configs:
        try:
            if not agrees(matmul(x, codes, None, config), expected):
                log.warning("%s: %s gives wrong products and is not used", problem, config)
                continue
            micros = timer(lambda config=config: matmul(x, codes, None, config))  # type: ignore[misc]
        except (TritonError, RuntimeError) as error:  # too large for the device
            log.info("%s: %s does not run here: %s", problem, config, error)
            continue
        found.append(Choice("kernel", config, micros))
    return min(found, key=lambda choice: choice.microseconds)


def agrees(out: Tensor, expected: Tensor) -> bool:
    error = (out.float() - expected.float()).norm() / expected.float().norm()
    return bool(error < TOLERANCE)


def dequantized(x: Tensor, codes: Codes, dense: Tensor) -> Tensor:
    """The product by way of 16-bit values in `dense`."""
    torch.ops.bitsandbytes.dequantize_4bit.out(
        codes.packed.view(-1, 1), codes.scales, codes.group, codes.kind, codes.shape, x.dtype,
        out=dense,
    )  # fmt: skip
    return x @ dense.T


def fused(x: Tensor, codes: Codes) -> Tensor:
    """The product by bitsandbytes' kernels, on the same bytes."""
    packed, shape = codes.packed.view(-1, 1), codes.shape
    out: Tensor = torch.ops.bitsandbytes.gemm_4bit(
        x, packed, shape, codes.scales, codes.group, codes.kind, None
    )
    return out


class Timer:
    """Median microseconds of a call on the current stream, nothing of it in the device's caches."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, work: Callable[[], object], repeats: int = REPEATS) -> float:
        work()
        pairs = []
        for _ in range(repeats):
            self._flush.zero_()  # takes longer than queueing the work: no launch is waited for
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            pairs.append((start, end))
        torch.cuda.current_stream(self._flush.device).synchronize()
        times: list[float] = [start.elapsed_time(end) * 1e3 for start, end in pairs]
        return sorted(times)[repeats // 2]


def _cache_file(device: torch.device) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    versions = ""
    if _has_triton():
        import triton

        versions = f"{torch.__version__} {triton.__version__}"
    identity = f"{torch.cuda.get_device_name(device)} {versions} {VERSION}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return Path(base) / "headrace" / f"matmul-{digest}.json"


def _load(file: Path) -> dict[Problem, Choice]:
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


def _save(file: Path, measured: dict[Problem, Choice]) -> None:
    """Written whole or not at all; the lock is held."""
    records = [{"problem": asdict(p), "choice": asdict(c)} for p, c in measured.items()]
    temporary = file.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(records, indent=1), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        log.warning("%s: cannot be written (%s): nothing measured is used", file, error)


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
