"""Rows to FP8 with scales, as one kernel; see fp8. Runs on CPUs with TRITON_INTERPRET=1."""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST = tl.constexpr(448.0)
"""Of float8_e4m3."""

_LEAST = tl.constexpr(1e-12)
"""Magnitude that is told from zero."""

_A_WARP = 2048


@triton.jit(do_not_specialize=["scale_of_group"])
def _round_kernel(
    x, out, scales, row_stride, scale_of_row, scale_of_group,
    SIZE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of SIZE elements, a scale for each GROUP of them."""
    GROUPS: tl.constexpr = BLOCK // GROUP
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * row_stride + at, mask=at < SIZE, other=0.0).to(tl.float32)
    groups = tl.reshape(values, (GROUPS, GROUP))
    scale = tl.maximum(tl.max(tl.abs(groups), 1), _LEAST) / _LARGEST
    # Divided correctly rounded, so that no quotient exceeds the largest.
    quotients = tl.reshape(tl.div_rn(groups, scale[:, None] + tl.zeros_like(groups)), (BLOCK,))
    tl.store(out + row * SIZE + at, quotients.to(out.dtype.element_ty), mask=at < SIZE)
    group = tl.arange(0, GROUPS)
    place = scales + row * scale_of_row + group * scale_of_group
    tl.store(place, scale, mask=group * GROUP < SIZE)


def round_rows(x: Tensor, padded: int, group: int) -> tuple[Tensor, Tensor]:
    """x [M, K] as float8_e4m3 [padded, K], and float32 scales [padded, K / group], neighbours those of
    rows. A power of two `group` divides K, or it is K. What is in padding is undefined."""
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, size = x.shape
    block = triton.next_power_of_2(size)
    out = torch.empty(padded, size, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(size // group, padded, dtype=torch.float32, device=x.device).T
    _round_kernel[(rows,)](
        x, out, scales, x.stride(0), scales.stride(0), scales.stride(1),
        SIZE=size, GROUP=block if group == size else group, BLOCK=block,
        num_warps=min(16, max(1, block // _A_WARP)),
    )  # fmt: skip
    return out, scales
