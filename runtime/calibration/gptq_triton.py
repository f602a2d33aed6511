"""The columns of a block, rounded one after the other, as one kernel on CUDA; see gptq.

A program takes some rows whole: rows know nothing of each other. From PyTorch, each column is some twenty
launches. Runs on CPUs with TRITON_INTERPRET=1.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.runtime.calibration.grids import AffineGrid, Grid, TableGrid

_ROWS = 16
"""Of a program: few, so that all processors have some."""

_WARPS = 4


@triton.jit
def _nearest(x, scale, zero, low, high, table, CODES: tl.constexpr):
    """Codes and values of x [rows]: codes from `low` to `high`, or of a sorted table of CODES values."""
    if CODES:
        relative = x / tl.maximum(scale, 1.1754943508222875e-38)
        code = tl.zeros_like(x).to(tl.int32)
        for i in tl.static_range(CODES - 1):
            border = (tl.load(table + i) + tl.load(table + i + 1)) / 2
            code += (relative > border).to(tl.int32)
        return code.to(tl.float32), tl.load(table + code) * scale
    # Adding 1.5 * 2^23 rounds half to even, as torch does, what has fewer than 23 bits.
    whole = tl.minimum(tl.maximum(x / scale, -512.0), 512.0)
    whole = (whole + 12582912.0) - 12582912.0
    code = tl.minimum(tl.maximum(whole + zero, low), high)
    return code, (code - zero) * scale


@triton.jit(do_not_specialize=["rows"])
def _round_kernel(
    left, inverse, scales, zeros, table, codes, errors, rows, row_stride, low, high,
    SIZE: tl.constexpr, CODES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """SIZE columns of BLOCK_R rows. `inverse` [SIZE, SIZE] is lower triangular; scales and zeros are [rows, SIZE]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (at < SIZE)
    x = tl.load(left + row * row_stride + at, mask=mask, other=0.0)
    scale = tl.load(scales + row * SIZE + at, mask=mask, other=1.0)
    zero = tl.load(zeros + row * SIZE + at, mask=mask, other=0.0)
    found = tl.zeros_like(x)
    lost = tl.zeros_like(x)
    for step in range(SIZE):
        i = SIZE - 1 - step
        mine = at == i
        column = tl.sum(tl.where(mine, x, 0.0), 1)
        its_scale = tl.sum(tl.where(mine, scale, 0.0), 1)
        its_zero = tl.sum(tl.where(mine, zero, 0.0), 1)
        code, value = _nearest(column, its_scale, its_zero, low, high, table, CODES)
        error = (column - value) / tl.load(inverse + i * SIZE + i)
        others = tl.load(inverse + i * SIZE + at, mask=at < i, other=0.0)
        x -= error[:, None] * others
        found = tl.where(mine, code[:, None], found)
        lost = tl.where(mine, error[:, None], lost)
    tl.store(codes + row * SIZE + at, found, mask=mask)
    tl.store(errors + row * SIZE + at, lost, mask=mask)


def round_block(left: Tensor, inverse: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes and errors [N, columns] float32 of the columns `left`, from the last to the first. `grid` has a number
    for each element of them."""
    rows, size = left.shape
    codes, errors = (torch.empty(rows, size, device=left.device) for _ in range(2))
    if isinstance(grid, TableGrid):
        scale = zero = grid.scale
        table, count, low, high = grid.table, len(grid.table), 0, 0
    else:
        assert isinstance(grid, AffineGrid)
        scale = table = grid.scale
        zero, count, low, high = grid.zero, 0, grid.low, grid.high
    _round_kernel[(triton.cdiv(rows, _ROWS),)](
        left, inverse.contiguous(), scale, zero, table, codes, errors,
        rows, left.stride(0), float(low), float(high),
        SIZE=size, CODES=count, BLOCK_R=_ROWS, BLOCK=triton.next_power_of_2(size), num_warps=_WARPS,
    )  # fmt: skip
    return codes, errors
