"""Block sizes for the attention kernels, fitted to a device before a launch; nothing is tried out."""

from dataclasses import dataclass

import torch

MIN_ROWS = 16
"""The smallest side of a tensor-core product."""

_SPLIT_TOKENS = 256  # a part of the keys that is worth a program
_MAX_SPLITS = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's block: rows of queries, keys a step, padded dims; warps and pipeline stages."""

    rows: int
    keys: int
    dim_k: int
    dim_v: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """Streaming multiprocessors, and bytes of shared memory that one block may have."""

    processors: int
    shared_memory: int

    @classmethod
    def of(cls, device: torch.device) -> "DeviceLimits":
        if device.type != "cuda":
            return cls(processors=8, shared_memory=96 * 1024)  # Triton's interpreter has no limits
        found = torch.cuda.get_device_properties(device)
        shared: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
        return cls(found.multi_processor_count, shared)


def power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()


def choose_tile(
    max_query: int, group: int, k_dim: int, v_dim: int, itemsize: int, limits: DeviceLimits
) -> Tile:
    """Rows to cover the queries; keys and stages to fill most of the shared memory.

    A row is one query of one of the `group` heads that share a key head. Decodes are bound by
    loads, which want more stages; prefill by the tensor cores, which want more rows, as long as
    the accumulators [rows, v_dim] stay in registers.
    """
    dim_k, dim_v = max(MIN_ROWS, power_of_two(k_dim)), max(MIN_ROWS, power_of_two(v_dim))
    most = 32 if itemsize == 4 else 128 if max(dim_k, dim_v) <= 128 else 64
    needed = power_of_two(max(MIN_ROWS, group * max_query))
    rows = max(min(needed, most), power_of_two(group))
    budget = limits.shared_memory * 9 // 10 - rows * dim_k * itemsize
    shapes = ((64, 3), (64, 2), (32, 3), (32, 2), (16, 2), (16, 1))
    # Triton's pipeline keeps stages - 1 tiles in shared memory. Exact float32 products are made in
    # registers, which 64 keys exhaust.
    for keys, stages in shapes[2:] if itemsize == 4 else shapes:
        if keys * (dim_k + dim_v) * itemsize * max(stages - 1, 1) <= budget:
            break
    warps = 8 if rows >= 128 or rows * dim_v > 64 * 128 else 4
    return Tile(rows, keys, dim_k, dim_v, warps, stages)


def choose_splits(programs: int, visible: int, limits: DeviceLimits) -> int:
    """Parts to cut the keys into, a power of two.

    Enough for two programs a processor, but no more than `visible` keys are worth.
    """
    fill = 2 * limits.processors // max(programs, 1)
    wanted = max(1, min(fill, -(-visible // _SPLIT_TOKENS), _MAX_SPLITS))
    return 1 << wanted.bit_length() - 1
