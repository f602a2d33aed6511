"""Products of FP8 weights on tensor cores that multiply FP8, by rows that are rounded to FP8 first.

Checkpoints whose activations are quantized ("dynamic" or "static") were made to be multiplied so. Rows are
divided by scales of their own: of a whole row where the weight has scales of rows or a single one, else
of each 128 columns (DeepSeek-V3, arXiv:2412.19437, section 3.3.2), their largest magnitude becoming 448.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn

BLOCK = 128
"""Rows and columns of a weight's block, and columns of a row, that share a scale."""

MULTIPLE = 16
"""Of which N and K have to be multiples, and of blocks' products the number of rows."""

BLOCKS_MULTIPLE = 4
"""Of which cuBLAS wants the blocks of a row to be a multiple."""

LEAST_CAPABILITY = (8, 9)
"""Of GPUs whose tensor cores multiply FP8; Triton makes no FP8 on others."""

MOST_COLUMNS = 1 << 16
"""Of a row that one program rounds."""


class Scales(Enum):
    """Of what a weight and the rows that multiply it have scales."""

    ROWS = "rows"
    BLOCKS = "blocks"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [M, K] in FP8 and their float32 scales [M, 1] or [M, K / 128], of which `count` are wanted."""

    values: Tensor
    scales: Tensor
    count: int


def scales_of(shape: Sequence[int], block: tuple[int, int]) -> Scales | None:
    """How matrices of a `shape` [..., N, K] with a scale for each `block` of rows and columns can be multiplied."""
    rows, columns = shape[-2:]
    height, width = block
    if rows % MULTIPLE or columns % MULTIPLE or columns > MOST_COLUMNS:
        return None
    if width >= columns and (height == 1 or height >= rows):
        return Scales.ROWS
    # With a single row of blocks it isn't told which way their scales lie.
    taken = rows > BLOCK and columns % (BLOCKS_MULTIPLE * BLOCK) == 0
    return Scales.BLOCKS if block == (BLOCK, BLOCK) and taken else None


def rounded(x: Tensor, scales: Scales) -> Rows:
    """x [..., K] on CUDA, in FP8."""
    from headrace.runtime.matmul.fp8_triton import round_rows  # Triton, where there is CUDA

    flat = x.reshape(-1, x.shape[-1])
    count, columns = flat.shape
    if scales is Scales.ROWS:
        return Rows(*round_rows(flat, count, columns), count)
    padded = -(-count // MULTIPLE) * MULTIPLE
    return Rows(*round_rows(flat, padded, BLOCK), count)


def multiply(rows: Rows, weight: Tensor, scale: Tensor, scales: Scales) -> Tensor:
    """`rows` times `weight` FP8 [N, K]: bfloat16 [count, N].

    `scale` is the weight's, float32 [N] or [1], or [N / 128, K / 128] rounded up.
    """
    if scales is Scales.BLOCKS:
        recipes = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
        given = scale.T
    else:
        recipes = F.ScalingType.RowWise, F.ScalingType.RowWise
        given = scale.reshape(1, -1).expand(1, len(weight)).contiguous()
    out = F.scaled_mm(
        rows.values, weight.T, rows.scales, recipes[0], given, recipes[1],
        output_dtype=torch.bfloat16, use_fast_accum=scales is Scales.ROWS,
    )  # fmt: skip
    return out[: rows.count]


@cache
def multiplied_by(device: torch.device) -> frozenset[Scales]:
    """What the device and the installed PyTorch multiply in FP8: found by trying, none of it on CPUs."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return frozenset()
    return frozenset(scales for scales in Scales if _works(device, scales))


def _works(device: torch.device, scales: Scales) -> bool:
    blocks = BLOCKS_MULTIPLE
    size = blocks * BLOCK
    weight = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    scale = torch.ones((blocks, blocks) if scales is Scales.BLOCKS else (size,), device=device)
    try:
        out = multiply(rounded(weight[:1], scales), weight.to(FP8), scale, scales)
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return bool((out == size).all())
