"""What the few-row 4-bit matmul is asked for, and the ways to run it. No Triton in here."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headrace.runtime.matmul.decode_4bit import WORD

BUCKETS = (8, 16, 32, 64, 128)
"""Rows that a launch may compute; fewer are padded. For 256 dequantizing was faster on an H200."""


TABLES = ("nf4", "fp4")
"""Kinds whose codes are looked up in a table, which bitsandbytes multiplies, too."""


LEAST_GROUP = {True: 64, False: 32}
"""The least group of int4, by whether it has zero points, whose scales `shared_bytes` has room for."""


@dataclass(frozen=True, slots=True)
class Config:
    """One way to run: output columns and words of K a step, parts of K, warps, pipeline stages."""

    columns: int
    words: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Packing:
    """How 4-bit weights lie that one launch multiplies by: of `kind` "nf4", "fp4" or "int4", `group` codes a
    scale, for int4 whether scales have zero points of their own, and the scales' type."""

    kind: str
    group: int
    zeros: bool = False
    scales: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Codes:
    """A 4-bit weight [N, K]: uint8 [N * K / 2], scales [N * K / group] of a float type, and zero points.

    `kind` is "nf4", "fp4" or "int4"; the latter's `zeros` are uint8, one a scale, or None where all
    are 8. bitsandbytes' kernels want float32 scales.
    """

    kind: str
    packed: Tensor
    scales: Tensor
    group: int
    shape: tuple[int, int]
    zeros: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Product:
    """What is multiplied in one launch: weights [N, K] of one format, an N each, and biases.

    `zeros`: codes of kind "int4" have zero points of their own. `scales`: their type.
    """

    kind: str
    group: int
    widths: tuple[int, ...]
    depth: int
    biased: bool = False
    zeros: bool = False
    scales: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Problem:
    """Products that take the same time: weights [N, K] of one format, by rows of at most `rows`.

    `kind` is "nf4", "fp4" or "int4"; the latter is measured with zero points where the kernel takes
    them and with float16 scales, as stores have them, and takes no longer without or with bfloat16.
    """

    kind: str
    group: int
    columns: int
    depth: int
    rows: int
    dtype: str

    @property
    def has_zeros(self) -> bool:
        return self.kind == "int4" and self.group >= LEAST_GROUP[True]

    @property
    def scales(self) -> torch.dtype:
        return torch.float16 if self.kind == "int4" else torch.float32


_TILES = {
    8: ((64, 64, 4, 3), (32, 64, 2, 3)),
    16: ((64, 32, 4, 3), (32, 64, 2, 3)),
    32: ((64, 32, 4, 3), (128, 16, 4, 3)),
    64: ((128, 32, 8, 3), (64, 32, 4, 3)),
    128: ((64, 32, 4, 3), (256, 16, 8, 3), (128, 16, 8, 4)),
}
"""(columns, words, warps, stages), by rows; the first is taken where nothing was measured.

The fastest for some size, or nearly, of a search on an H200 (benchmarks/matmul.py --search).
"""

RESIDENT = 2
"""Programs of a multiprocessor that are worth having parts for."""

MANY = 4
"""Parts of K beyond which the next tile is tried first."""

UNEVEN = 1.1
"""By how much the largest part of K may exceed the mean."""


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
    fewer. Enough for groups of 32, or of 64 with zero points; for sm_90 exact, but for tiles of two
    warps, which need less."""
    codes = config.columns * config.words * 4
    scales = config.columns * config.words
    ordered = bucket(rows) * config.words * WORD * 2
    return (codes + scales) * (config.stages - 1) + ordered * config.stages


def candidates(
    columns: int, depth: int, rows: int, processors: int, shared: int
) -> Iterator[Config]:
    """The few configurations worth trying, the one to take without trying first.

    `columns` are those of all weights of a launch, `shared` is the shared memory in bytes that a
    program may have.
    """
    found: list[tuple[Config, int]] = []
    for tile in _TILES[bucket(rows)]:
        whole = _fitting(tile, depth, rows, shared)
        if whole is not None and all(whole != other for other, _ in found):
            slots = processors * _resident(whole, rows, shared)
            found.append((whole, _parts(depth, columns, whole, slots)))
    # Few columns want a narrow tile rather than many parts.
    found.sort(key=lambda each: each[1] > MANY)
    for place, (whole, parts) in enumerate(found):
        most = max(1, depth // (WORD * whole.words) // 2)
        others = () if place else (max(1, parts // 2), min(2 * parts, most))
        for splits in sorted({parts, *others}, key=lambda n: (n != parts, n)):
            yield replace(whole, splits=splits)


def _parts(depth: int, columns: int, config: Config, slots: int) -> int:
    """The most parts of K, nearly even ones of two steps at least, that all run at once."""
    steps = depth // (WORD * config.words)
    most = max(1, min(slots // -(-columns // config.columns), steps // 2))
    return next(n for n in range(most, 0, -1) if -(-steps // n) * n <= UNEVEN * steps)


def _resident(config: Config, rows: int, shared: int) -> int:
    """Programs that a multiprocessor runs at once."""
    return min(RESIDENT, shared // shared_bytes(config, rows))


def _fitting(tile: tuple[int, int, int, int], depth: int, rows: int, shared: int) -> Config | None:
    """The tile, made to fit K and the device; None where it cannot be."""
    columns, words, warps, stages = tile
    while depth % (WORD * words):
        words //= 2
    while True:
        config = Config(columns, words, 1, warps, stages)
        if shared_bytes(config, rows) <= shared:
            return config
        if stages > 2:
            stages -= 1
        elif words > 16:
            words //= 2
        else:
            return None
