"""Formats with a scale for each group of a row's columns: writing int4, and the reference for both.

    int4   X.weight (U8 [n/2, 1], even element in the high nibble), X.weight.scale (F16 [rows,
           columns / group]) and X.weight.zero (U8, of scale's shape)
    int8g  X.weight (I8 [rows, columns]) and X.weight.scale

Imported weights may have scales of other types, offsets in the place of zero points, or an order of
their columns (store.WeightSpec).
"""

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from headrace.runtime.block_file import Entry
from headrace.runtime.conversion.part import Part
from headrace.runtime.store import WeightSpec
from headrace.scheduler.errors import StoreError

AFFINE = ("int4", "int8g")

GROUP_SIZE = 64
GROUP_SIZES = (32, 64, 128)

_LEAST_SCALE = 2.0**-24
"""The least float16 above zero."""


def group_of(columns: int, wanted: int) -> int:
    """The largest group of at most `wanted` columns, halved down to 32, that divides a row; else the row."""
    while wanted >= GROUP_SIZES[0]:
        if columns % wanted == 0:
            return wanted
        wanted //= 2
    return columns


def int4_parts(name: str, shape: tuple[int, ...], group_size: int) -> tuple[Part, ...]:
    """The tensors that int4 stores of a weight, in order. Raises StoreError for odd rows."""
    rows, columns = prod(shape[:-1]), shape[-1]
    if columns % 2:
        raise StoreError(
            f"{name} has rows of {columns} columns, an odd number, and cannot be stored as int4; "
            f"keep it with --policy '{name}=keep'"
        )
    groups = columns // group_of(columns, group_size)
    return (
        Part("data", Entry(name, "U8", (rows * columns // 2, 1))),
        Part("scale", Entry(f"{name}.scale", "F16", (rows, groups))),
        Part("zero", Entry(f"{name}.zero", "U8", (rows, groups))),
    )


def encode_int4(rows: Tensor, name: str, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest between each group's extremes: packed [n/2, 1], scale and zero [rows, groups].

    The range takes in zero, which stays exact. Codes are chosen for the scale as float16 holds it.
    Raises StoreError for what is not finite or has no scale in float16.
    """
    values = rows.float().reshape(-1, groups, rows.shape[-1] // groups)
    low = values.amin(-1).clamp(max=0)
    high = values.amax(-1).clamp(min=0)
    if not bool(torch.isfinite(high - low).all()):
        raise StoreError(f"{name} holds NaN or infinity, which cannot be quantized")
    scale = ((high - low) / 15).clamp(min=_LEAST_SCALE).half()
    if not bool(torch.isfinite(scale).all()):
        raise StoreError(
            f"{name} has values up to {float((high - low).max()):.1e}, too large for int4's float16 "
            f"scales; keep it with --policy '{name}=keep'"
        )
    wide = scale.float()
    zero = torch.round(-low / wide).clamp(0, 15)
    codes = torch.round(values / wide[..., None]).add_(zero[..., None]).clamp_(0, 15)
    pairs = codes.to(torch.uint8).view(-1, 2)
    packed = (pairs[:, 0] << 4 | pairs[:, 1])[:, None]
    return packed, scale, zero.to(torch.uint8)


def decode_affine(spec: WeightSpec, parts: Mapping[str, Tensor]) -> Tensor:
    """float32 values of a weight, by definition."""
    columns = spec.shape[-1]
    data = parts["data"].reshape(-1)
    codes = data if spec.format == "int8g" else torch.stack((data >> 4, data & 15), dim=1)
    codes = codes.reshape(-1, columns).float()

    def wide(part: Tensor) -> Tensor:
        return part.float().reshape(len(codes), -1).repeat_interleave(spec.blocksize, dim=1)

    if "offset" in parts:
        values = codes * wide(parts["scale"]) + wide(parts["offset"])
    elif spec.format == "int8g":
        values = codes * wide(parts["scale"])
    else:
        zero = wide(parts["zero"]) if "zero" in parts else 8
        values = (codes - zero) * wide(parts["scale"])
    if "order" in parts:
        values = torch.empty_like(values).index_copy_(1, parts["order"].long(), values)
    return values.reshape(spec.shape)


def int4_tail(pieces: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What follows the codes: (role, tensor), from the scales and zeros of all runs of rows."""
    yield "scale", torch.cat([scale for scale, _ in pieces])
    yield "zero", torch.cat([zero for _, zero in pieces])
