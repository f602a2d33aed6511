"""8- and 4-bit floats with scales to values, written where the caller says, a few rows at a time."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from headrace.runtime.weights.affine import nibbles, row_runs

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of four-bit floats, by code. OCP Microscaling Formats 1.0, 5.3.3."""

MX_BLOCK, NV_BLOCK = 32, 16
"""Consecutive columns that share a scale of MXFP4 and of NVFP4."""


def fp8_values(
    data: Tensor, scale: Tensor, block: tuple[int, int], first: int, out: Tensor
) -> None:
    """`data` float8 [rows, columns], rows `first` and on of a matrix, times their blocks' `scale`
    (float32, of the whole matrix, one for `block` rows and columns), into `out`. Rounded once."""
    if data.is_cuda:
        from headrace.runtime.matmul import fp8_triton

        fp8_triton.values(data, scale, block, first, out)
        return
    rows, columns = data.shape
    height, width = block
    for run in row_runs(rows, columns, data.device):
        row = torch.arange(first + run.start, first + run.stop, device=data.device) // height
        scales = scale.index_select(0, row)  # [run, blocks of a row]
        some, onto = data[run].float(), out[run]
        if scales.shape[1] * width == columns:
            wide, shape = scales[..., None], (len(some), -1, width)
            torch.mul(some.view(shape), wide, out=onto.view(shape))
        else:
            torch.mul(some, scales.repeat_interleave(width, dim=1)[:, :columns], out=onto)


def float4_values(packed: Tensor, scales: Callable[[slice], Tensor], out: Tensor) -> Tensor:
    """`packed` uint8 [rows, columns / 2], even column in the high nibble, times the float32 scales [run, groups]
    of a run of rows, into `out` [rows, columns]."""
    table = _table(out.dtype, out.device)
    for run in row_runs(len(packed), out.shape[1], out.device):
        scale = scales(run).reshape(-1, 1)
        some = out[run].view(len(scale), -1)
        codes = nibbles(packed[run]).view(-1).int()
        values = table.index_select(0, codes).view(some.shape)
        torch.mul(values, scale, out=some)
    return out


def exponents(scale: Tensor) -> Tensor:
    """E8M0 bytes as float32 powers of two; 255 is NaN."""
    return scale.view(torch.float8_e8m0fnu).float()


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(E2M1, dtype=dtype, device=device)
