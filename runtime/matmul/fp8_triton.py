"""Rows to FP8 with scales, and FP8 weights to values, as one kernel each. Both run on CPUs with TRITON_INTERPRET=1."""

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

_UP = tl.constexpr(2.0**120)
"""What e4m3's bits as the upper ones of a float32 are too small by: exponents count from 7, not from 127."""

_ELEMENTS = 2048
"""Of a program that makes values."""


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


@triton.jit(do_not_specialize=["first", "height", "width"])
def _values_kernel(
    codes, scales, out, columns, first, height, width, scales_a_row, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK columns of a row. By bits, since GPUs before sm_89 have no instruction for it."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < columns
    code = tl.load(codes + row * columns + at, mask=mask, other=0).to(tl.int32)
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * _UP
    value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    scale = tl.load(scales + (first + row) // height * scales_a_row + at // width, mask=mask)
    tl.store(out + row * columns + at, (value * scale).to(out.dtype.element_ty), mask=mask)


def values(
    data: Tensor, scale: Tensor, block: tuple[int, int], first: int, out: Tensor
) -> Tensor:  # fmt: skip
    """`data` float8_e4m3 [rows, columns], rows `first` and on of a matrix, times the `scale` (float32, of the
    whole matrix) of each `block` of rows and columns, into `out`. Computed in float32 and rounded once."""
    assert data.is_contiguous() and out.is_contiguous() and scale.stride(-1) == 1
    rows, columns = data.shape
    _values_kernel[(rows, triton.cdiv(columns, _ELEMENTS))](
        data.view(torch.uint8), scale, out, columns, first, *block, scale.stride(0), BLOCK=_ELEMENTS
    )
    return out
