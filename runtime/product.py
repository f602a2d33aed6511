"""The product of rows and dense values, a row's sums in one order whatever the other rows are."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

PADDED_ROWS = 16
"""From this many rows MKL's float32 kernels sum in one order; below, if not asked otherwise, a row's
bits change with the number of rows. Measured with MKL 2024.2, in one thread, for 17 shapes."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear. In float32 on a CPU a row's result does not depend on the other rows of x."""
    rows = x.shape[:-1].numel()
    if rows == 1 and x.dtype == torch.bfloat16 and not x.is_cuda and bias is None:
        # A sixth faster than F.linear where the weight comes from memory: 128256 x 2048.
        return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    if x.is_cuda or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    # As a matrix: rows of three dimensions with some strides would be multiplied one by one.
    flat = x.reshape(rows, -1)
    if rows < PADDED_ROWS and rows < least_rows():
        flat = F.pad(flat, (0, 0, 0, PADDED_ROWS - rows))
    return F.linear(flat, weight, bias)[:rows].view(*x.shape[:-1], -1)


def product_by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, heads, K] times each head's own weight [heads, N, K]: [T, heads, N], any strides.

    In float32 on a CPU a token's result does not depend on the other tokens.
    """
    tokens = len(x)
    if not x.is_cuda and x.dtype == torch.float32 and tokens < PADDED_ROWS:
        padded = F.pad(x, (0, 0, 0, 0, 0, PADDED_ROWS - tokens))
        return torch.bmm(padded.transpose(0, 1), weight.mT).transpose(0, 1)[:tokens]
    return torch.bmm(x.transpose(0, 1), weight.mT).transpose(0, 1)


@cache
def least_rows() -> int:
    """1 where few rows are multiplied with the same sums as many, as MKL does when it is asked to
    (headrace.runtime); else PADDED_ROWS. Found by trying."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PADDED_ROWS, 640, generator=generator)
    weight = torch.randn(256, 640, generator=generator)
    many = F.linear(x, weight)
    same = all(torch.equal(F.linear(x[:n], weight), many[:n]) for n in (1, 2, 5, 11))
    return 1 if same else PADDED_ROWS
