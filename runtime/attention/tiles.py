"""Block sizes for the attention kernels, fitted to a device before a launch; nothing is tried out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

MIN_ROWS = 16
"""The smallest side of a tensor-core product."""

# (rows, keys, warps, stages), of which the first that fits is taken, with no more rows than queries
# fill. From 64 rows on, Hopper's asynchronous products are used. But for float32
# (_EXACT), the first was within 8 % of the fastest of a search on an H200 (benchmarks/attention.py).
_LONG = ((64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (64, 16, 4, 2))
_BRIEF = ((64, 32, 4, 3), (64, 32, 4, 2), (64, 16, 4, 2))
_EXACT = ((32, 32, 4, 3), (32, 32, 4, 2), (32, 16, 4, 2), (32, 16, 4, 1))
_FEW = ((32, 32, 4, 4), *_EXACT)
_CODES = (MIN_ROWS, 64, 4, 3)  # of quantized pages, for the fewest rows
_LONG_KEYS = 1024

# Of latents, whose sums are hundreds of numbers wide: compiled for Hopper, none spills registers to
# memory but for some in the loop over quantized layers' own pages. With a loop of their own for keys that
# every row sees, they do.
_LATENT = (
    (64, 32, 8, 3), (64, 32, 8, 2), (64, 16, 8, 2), (32, 32, 8, 2), (32, 16, 4, 2), (16, 16, 4, 2),
)  # fmt: skip
_EXACT_LATENT = ((16, 16, 4, 2), (16, 16, 4, 1))

# In the time that a tile takes at a processor's share of the memory's bandwidth.
_START = 2  # what a program costs beside its tiles
_MERGE = 4
_MAX_SPLITS = 64
_MAX_PROGRAMS = 16  # a processor, that splitting makes
_MAX_PARTS = 16 * 64 * 128  # sums that these keep for each processor


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's block: rows of queries, keys a step, padded dims; warps and pipeline stages.

    A row is one query of one of the heads that share a key head. `peel`: keys that every row sees
    are taken without masks, in a loop of their own.
    """

    rows: int
    keys: int
    dim_k: int
    dim_v: int
    warps: int
    stages: int
    peel: bool


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """Streaming multiprocessors, bytes of shared memory that one block may have, and Hopper's wgmma."""

    processors: int
    shared_memory: int
    wgmma: bool

    @classmethod
    def of(cls, device: torch.device) -> "DeviceLimits":
        if device.type != "cuda":
            return cls(8, 96 * 1024, False)  # Triton's interpreter has no limits
        found = torch.cuda.get_device_properties(device)
        shared: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
        return cls(found.multi_processor_count, shared, found.major == 9)


def power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()


def padded_dim(dim: int) -> int:
    return max(MIN_ROWS, power_of_two(dim))


def widened(tile: Tile, bits: int) -> Tile:
    """With dims as wide as numbers of `bits` need: those of a word of 16 bits are multiplied apart."""
    least = MIN_ROWS * 16 // min(bits, 16)
    return replace(tile, dim_k=max(tile.dim_k, least), dim_v=max(tile.dim_v, least))


def shared_bytes(tile: Tile, itemsize: int, limits: DeviceLimits, bits: int = 16) -> int:
    """Shared memory for the queries and for the keys and values in flight.

    Triton's pipeline keeps stages - 1 tiles, and one more where products read them asynchronously. Of
    quantized pages (of fewer `bits`), such products read what codes were made into.
    """
    wgmma = limits.wgmma and tile.rows >= 64 and itemsize == 2
    step = tile.keys * (tile.dim_k + tile.dim_v)
    if bits < 16:
        kept = max(tile.stages - 1, 1) * step * bits // 8 + wgmma * step * itemsize
    else:
        kept = max(tile.stages - (not wgmma), 1) * step * itemsize
    return tile.rows * tile.dim_k * itemsize + kept


def choose_tile(
    queries: int, visible: int, group: int, k_dim: int, v_dim: int, itemsize: int,
    limits: DeviceLimits, bits: int = 16,
) -> Tile:  # fmt: skip
    """For sequences of at most `queries` queries, each of which sees at most `visible` keys, in pages
    of numbers or of codes of fewer `bits`.

    Decodes are bound by loads, which small programs keep under way best; prefill by the tensor
    cores, which want more rows and keys, as long as scores and sums [rows, v_dim] stay in registers.
    """
    dims = padded_dim(k_dim), padded_dim(v_dim)
    needed = max(MIN_ROWS, power_of_two(group * queries))
    found = list(_candidates(needed, visible, power_of_two(group), dims, itemsize))
    if bits < 16 and itemsize < 4 and needed == MIN_ROWS:
        rows, keys, warps, stages = _CODES
        found.insert(0, Tile(rows, keys, *dims, warps, stages, peel=False))
    budget = limits.shared_memory * 9 // 10
    return next(
        (tile for tile in found if shared_bytes(tile, itemsize, limits) <= budget), found[-1]
    )


def choose_latent_tile(
    queries: int, group: int, k_dim: int, v_dim: int, itemsize: int, limits: DeviceLimits
) -> Tile:
    """`choose_tile` where values are parts of keys too, and k_dim is what follows in keys.

    Heads share one key head by the hundred, and a block takes some of them (heads_at_once).
    """
    dims = padded_dim(k_dim), padded_dim(v_dim)
    needed = max(MIN_ROWS, power_of_two(group * queries))
    found = [
        Tile(min(rows, needed), keys, *dims, warps, stages, peel=False)
        for rows, keys, warps, stages in (_EXACT_LATENT if itemsize == 4 else _LATENT)
    ]
    budget = limits.shared_memory * 9 // 10
    return next((t for t in found if _latent_bytes(t, itemsize, limits) <= budget), found[-1])


def _latent_bytes(tile: Tile, itemsize: int, limits: DeviceLimits) -> int:
    return shared_bytes(tile, itemsize, limits) + tile.rows * tile.dim_v * itemsize


def heads_at_once(group: int, tile: Tile) -> int:
    """Of `group` heads that share a key head, those of one block: as many as divide them evenly."""
    return next(n for n in range(min(group, tile.rows), 0, -1) if group % n == 0)


def _candidates(
    needed: int, visible: int, group: int, dims: tuple[int, int], itemsize: int
) -> Iterator[Tile]:
    """Best first. Exact float32 products are made in registers, which many keys exhaust."""
    many = needed >= 64 and itemsize < 4
    long = visible >= _LONG_KEYS and max(dims) <= 128
    shapes = (_LONG if long else _BRIEF) if many else _EXACT if itemsize == 4 else _FEW
    for rows, keys, warps, stages in shapes:
        rows = max(min(rows, needed), group)
        if rows * dims[1] > 64 * 128:
            warps = 8
        elif rows == MIN_ROWS and itemsize < 4:
            warps = 2
        yield Tile(rows, keys, *dims, warps, stages, peel=many and visible >= 16 * keys)


def choose_splits(
    programs: int, visible: int, tile: Tile, limits: DeviceLimits, bits: int = 16
) -> int:
    """Parts to cut the keys of `programs` programs into.

    The busiest processor's tiles are what counts, and it is full with two programs, with four that
    take codes of fewer `bits` apart, or with one that is bound by the tensor cores.
    """
    tiles = -(-visible // tile.keys)
    full = 1 if tile.rows >= 64 else 2 if bits >= 16 else 4

    def cost(splits: int) -> int:
        busiest = max(-(-programs * splits // limits.processors), full)
        return busiest * (-(-tiles // splits) + _START) + (_MERGE if splits > 1 else 0)

    at_most = max(1, min(_MAX_PROGRAMS, _MAX_PARTS // (tile.rows * tile.dim_v)))
    most = min(tiles, _MAX_SPLITS, max(1, at_most * limits.processors // programs))
    return min(range(1, most + 1), key=cost)
