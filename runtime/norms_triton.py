"""An RMS norm as one kernel on CUDA; see norms.

A program takes some rows whole. Computes in float32 and rounds once. Runs on CPUs with
TRITON_INTERPRET=1.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS, _A_WARP = 1024, 512
"""Of a program, where rows are shorter, and of a warp."""


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x, weight, out, rows, row_stride, eps,
    SIZE: tl.constexpr, OFFSET: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of SIZE elements."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (at < SIZE)
    values = tl.load(x + row * row_stride + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(values * values, 1) / SIZE
    factor = tl.load(weight + at, mask=at < SIZE, other=0.0).to(tl.float32) + OFFSET
    values = values * tl.rsqrt(mean + eps)[:, None] * factor
    tl.store(out + row * SIZE + at, values.to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: int) -> Tensor:
    """x [..., n] / sqrt(mean(x^2) + eps) * (offset + weight [n]), in the type of x."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    rows, size = flat.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(size)
    block_r = max(1, _ELEMENTS // block)
    warps = min(16, max(1, block * block_r // _A_WARP))
    _norm_kernel[(triton.cdiv(rows, block_r),)](
        flat, weight, out, rows, flat.stride(0), eps,
        SIZE=size, OFFSET=offset, BLOCK_R=block_r, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out
