"""What the few-row 4-bit matmul is asked for, and the ways to run it. No Triton in here."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.runtime.matmul.decode_4bit import WORD

BUCKETS = (16, 32, 64, 128, 256)
"""Rows that a launch may compute; fewer are padded."""

WAVES = (1, 2, 4, 8)
"""Programs per multiprocessor that are tried, reached by splitting K."""


@dataclass(frozen=True, slots=True)
class Config:
    """One way to run: output columns and words of K a step, parts of K, warps, pipeline stages."""

    columns: int
    words: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Codes:
    """A 4-bit weight [N, K]: uint8 [N * K / 2], float32 scales [N * K / group], and zero points.

    `kind` is "nf4", "fp4" or "int4"; the latter's `zeros` are whole numbers, one a scale, or None
    where all are 8.
    """

    kind: str
    packed: Tensor
    scales: Tensor
    group: int
    shape: tuple[int, int]
    zeros: Tensor | None = None


_TILES = {
    16: ((64, 32, 4, 4), (128, 32, 8, 4), (32, 32, 2, 4), (64, 64, 4, 3)),
    32: ((64, 32, 4, 4), (128, 32, 8, 3), (64, 16, 4, 5)),
    64: ((128, 32, 8, 3), (64, 32, 4, 3), (128, 16, 8, 4)),
    128: ((128, 16, 8, 3), (64, 16, 4, 3)),
    256: ((128, 16, 8, 2), (64, 16, 4, 2)),
}
"""(columns, words, warps, stages), by rows; the first is taken where nothing was measured.

Chosen from what compiles for sm_90 without spills, with two or more programs a multiprocessor.
"""


def bucket(rows: int) -> int:
    """The least of BUCKETS that holds `rows`."""
    return next(size for size in BUCKETS if rows <= size)


def supports(group: int, depth: int, rows: int, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for `rows` rows of `dtype` times a weight of K = `depth`."""
    whole = depth % group == 0 and depth % (16 * WORD) == 0
    even = group >= 2 * WORD and group & (group - 1) == 0
    known = dtype in (torch.bfloat16, torch.float16)
    return whole and even and known and 0 < rows <= BUCKETS[-1]


def fits(config: Config, depth: int) -> bool:
    """Whether K divides into the steps of `config`, and there is a step for every part."""
    step = WORD * config.words
    return depth % step == 0 and config.splits <= depth // step


def shared_bytes(config: Config, rows: int) -> int:
    """Shared memory of a program: one buffer of ordered rows a stage, and one of codes and scales
    fewer. Enough for groups of 32, or of 64 with zero points; exact for sm_90."""
    codes = config.columns * config.words * 4
    scales = config.columns * config.words
    ordered = bucket(rows) * config.words * WORD * 2
    return (codes + scales) * (config.stages - 1) + ordered * config.stages


def candidates(
    columns: int, depth: int, rows: int, processors: int, shared: int
) -> Iterator[Config]:
    """Configurations worth trying, the one to take without trying first.

    `shared` is the shared memory in bytes that a program may have.
    """
    seen = set()
    for tile in _TILES[bucket(rows)]:
        for waves in (WAVES[1], *WAVES):
            for config in _shrunk(tile, columns, depth, rows, processors * waves, shared):
                if config not in seen:
                    seen.add(config)
                    yield config


def _shrunk(
    tile: tuple[int, int, int, int], columns: int, depth: int, rows: int, programs: int, shared: int
) -> Iterator[Config]:
    """The tile with splits for about `programs` programs, made to fit K and the device; or none."""
    width, words, warps, stages = tile
    while depth % (WORD * words):
        words //= 2
    while True:
        steps = depth // (WORD * words)
        splits = max(1, min(round(programs / -(-columns // width)), steps // 2))
        config = Config(width, words, splits, warps, stages)
        if shared_bytes(config, rows) <= shared:
            yield config
            return
        if stages > 2:
            stages -= 1
        elif words > 16:
            words //= 2
        else:
            return
