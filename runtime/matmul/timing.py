"""Time the ways to a product of few rows and a 4-bit weight, with random values of its size."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headrace.runtime.matmul.configs import TABLES, Codes, Config, Problem
from headrace.runtime.matmul.room import FLUSH_BYTES
from headrace.runtime.weights.affine import Numbers, int4_values

log = logging.getLogger(__name__)

TOLERANCE = 0.02
"""Relative error of a product, in bfloat16, beyond which a configuration is not used."""

REPEATS = 15

MOST_FLUSHES = 48
"""A host that takes longer than so many to queue a product is hopeless: milliseconds on any GPU."""

Path_ = Literal["kernel", "bitsandbytes", "dense"]


@dataclass(frozen=True, slots=True)
class Choice:
    """How to multiply; `config` is our kernel's. `microseconds` is what it took, 0 if not measured."""

    path: Path_
    config: Config | None = None
    microseconds: float = 0.0


def sample(device: torch.device, problem: Problem) -> tuple[Tensor, Codes]:
    """Random rows and a random weight of a problem's size."""
    columns, depth = problem.columns, problem.depth
    generator = torch.Generator(device).manual_seed(0)

    def ints(count: int, high: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(high, (count,), generator=generator, device=device, dtype=dtype)

    groups = columns * depth // problem.group
    scales = torch.rand(groups, generator=generator, device=device)
    codes = Codes(
        problem.kind,
        ints(columns * depth // 2, 256, torch.uint8),
        (scales + 0.1).to(problem.scales),
        problem.group,
        (columns, depth),
        ints(groups, 16, torch.uint8) if problem.has_zeros else None,
    )
    x = torch.randn(problem.rows, depth, generator=generator, device=device)
    return x.to(getattr(torch, problem.dtype)), codes


def fastest(device: torch.device, problem: Problem, configs: Iterable[Config]) -> Choice:
    """The fastest way for a problem, of those that give the right product.

    Raises RuntimeError, as torch does, when there is too little device memory for it.
    """
    from triton.runtime.errors import TritonError

    from headrace.runtime.matmul.kernel import matmul

    x, codes = sample(device, problem)
    timer = Timer(device)
    dense = torch.empty(codes.shape, dtype=x.dtype, device=device)
    found = [Choice("dense", None, timer(lambda: dequantized(x, codes, dense)))]
    if codes.kind in TABLES:
        found.append(Choice("bitsandbytes", None, timer(lambda: fused(x, codes))))
    expected = dequantized(x, codes, dense)
    for config in configs:
        try:
            if not agrees(matmul(x, codes, None, config), expected):
                log.warning("%s: %s gives wrong products and is not used", problem, config)
                continue
            micros = timer(lambda config=config: matmul(x, codes, None, config))  # type: ignore[misc]
        except TritonError as error:  # too large for the device
            log.info("%s: %s does not run here: %s", problem, config, error)
            continue
        found.append(Choice("kernel", config, micros))
    return min(found, key=lambda choice: choice.microseconds)


def agrees(out: Tensor, expected: Tensor) -> bool:
    error = (out.float() - expected.float()).norm() / expected.float().norm()
    return bool(error < TOLERANCE)


def dequantized(x: Tensor, codes: Codes, dense: Tensor) -> Tensor:
    """The product by way of 16-bit values in `dense`."""
    if codes.kind not in TABLES:
        rows = codes.shape[0]
        zeros = None if codes.zeros is None else codes.zeros.view(rows, -1)
        packed, scales = codes.packed.view(rows, -1), codes.scales.view(rows, -1)
        return x @ int4_values(packed, Numbers(scales), zeros, None, dense).T
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
        self._flushes = 3

    def __call__(self, work: Callable[[], object], repeats: int = REPEATS) -> float:
        work()
        pairs = [self._queue(work) for _ in range(repeats)]
        torch.cuda.current_stream(self._flush.device).synchronize()
        times: list[float] = [start.elapsed_time(end) * 1e3 for start, end in pairs]
        return sorted(times)[repeats // 2]

    def _queue(self, work: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """The events around a call that was queued whole before the device came to it: else it
        would be the host's time, which on a busy machine is five times the device's."""
        while True:
            for _ in range(self._flushes):
                self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            if self._flushes >= MOST_FLUSHES or not start.query():
                return start, end
            self._flushes *= 2
