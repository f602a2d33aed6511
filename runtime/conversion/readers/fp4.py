"""4-bit floats (e2m1) of a matrix, two in a byte, the even column in the low nibble: NVFP4 and MXFP4.

    data    U8 [rows, columns / 2]
    scale   F8_E4M3 [rows, columns / 16] (NVFP4), or U8 [rows, columns / 32], exponents of two plus 127 (MXFP4)

NVFP4's scales have one more scale in common.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from headrace.runtime.conversion.readers.packing import UNREADABLE, repacked
from headrace.runtime.conversion.source import SourceTensor, SourceWeight
from headrace.runtime.weights.small_floats import MX_BLOCK, NV_BLOCK
from headrace.scheduler.errors import StoreError


def weight(
    name: str, data: SourceTensor, scale: SourceTensor, common: Callable[[], Tensor] | None
) -> SourceWeight:
    """A weight stored as nvfp4, all of whose scales are multiplied by the `common` one, or as mxfp4.

    Raises StoreError for types and shapes that are not read.
    """
    fmt, dtype, block = "nvfp4", "F8_E4M3", NV_BLOCK
    if common is None:
        fmt, dtype, block = "mxfp4", "U8", MX_BLOCK
    rows = data.shape[0]
    columns = 2 * data.shape[-1]
    if (
        (data.dtype, len(data.shape), scale.dtype) != ("U8", 2, dtype)
        or columns % block
        or scale.shape != (rows, columns // block)
    ):
        raise StoreError(
            f"{name} is {data.dtype} {list(data.shape)} with scales {scale.dtype} {list(scale.shape)}, which is "
            f"not read here as {fmt.upper()}, only matrices with {dtype} scales of {block} columns; {UNREADABLE}"
        )
    others = {"scale": (dtype, (rows, columns // block))}
    if common is not None:
        others["row_scale"] = ("F32", (rows, 1))

    def pieces() -> Iterator[tuple[str, Tensor]]:
        for run in data.rows():
            yield "data", run << 4 | run >> 4
        yield "scale", scale.tensor()
        if common is not None:
            yield "row_scale", common().float().reshape(1, 1).expand(rows, 1)

    return repacked(name, fmt, (rows, columns), data, others, pieces)


def inverse(scale: SourceTensor) -> Tensor:
    """Of one that others are divided by."""
    return torch.reciprocal(scale.tensor().float())
