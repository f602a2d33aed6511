"""Formats with a scale for each group of a row's columns: writing int4 and int3, and the reference for all.

    int4   X.weight (U8 [n/2, 1], even element in the high nibble), X.weight.scale (F16 [rows,
           columns / group]) and X.weight.zero (U8, of scale's shape)
    int3   X.weight (U8 [rows, 3 ceil(columns / 8)]: eight codes are three bytes, the first code the lowest bits of
           the first byte; a row that does not fill its last bytes ends in zeros), .scale and .zero as in int4
    int8g  X.weight (I8 [rows, columns]) and X.weight.scale

Imported weights may have scales of other types, offsets in the place of zero points, or an order of
their columns (store.WeightSpec).
"""

from collections.abc import Iterator, Mapping
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from headrace.runtime.block_file import Entry
from headrace.runtime.conversion.part import Part
from headrace.runtime.manifest import WeightSpec
from headrace.scheduler.errors import StoreError

AFFINE = ("int4", "int3", "int8g")
BITS = {"int4": 4, "int3": 3}
"""Of a code, in the formats that are written here."""

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


def int3_parts(name: str, shape: tuple[int, ...], group_size: int) -> tuple[Part, ...]:
    """The tensors that int3 stores of a weight, in order."""
    rows, columns = prod(shape[:-1]), shape[-1]
    groups = columns // group_of(columns, group_size)
    return (
        Part("data", Entry(name, "U8", (rows, 3 * -(-columns // 8)))),
        Part("scale", Entry(f"{name}.scale", "F16", (rows, groups))),
        Part("zero", Entry(f"{name}.zero", "U8", (rows, groups))),
    )


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [rows, columns] as they are stored: [n/2, 1] of 4 bits, [rows, 3 ceil(columns / 8)] of 3."""
    if bits == 4:
        pairs = codes.reshape(-1, 2)
        return (pairs[:, 0] << 4 | pairs[:, 1])[:, None]
    rows, columns = codes.shape
    eights = pad(codes, (0, -columns % 8)).view(rows, -1, 8).int()
    words = (eights << (3 * torch.arange(8, dtype=torch.int32))).sum(-1, dtype=torch.int32)
    return torch.stack([words >> shift & 255 for shift in (0, 8, 16)], -1).view(rows, -1).byte()


def unpack3(packed: Tensor, columns: int) -> Tensor:
    """uint8 [rows, 3 ceil(columns / 8)] -> codes, int64 [rows, columns]."""
    three = packed.view(len(packed), -1, 3).long()
    words = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16
    codes = words[..., None] >> (3 * torch.arange(8)) & 7
    return codes.reshape(len(packed), -1)[:, :columns]


def encode_affine(rows: Tensor, name: str, groups: int, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest between each group's extremes: packed codes, scale and zero [rows, groups].

    The range takes in zero, which stays exact. Codes are chosen for the scale as float16 holds it.
    Raises StoreError for what is not finite or has no scale in float16.
    """
    top = 2 ** BITS[fmt] - 1
    values = rows.float().reshape(-1, groups, rows.shape[-1] // groups)
    low = values.amin(-1).clamp(max=0)
    high = values.amax(-1).clamp(min=0)
    if not bool(torch.isfinite(high - low).all()):
        raise StoreError(f"{name} holds NaN or infinity, which cannot be quantized")
    scale = ((high - low) / top).clamp(min=_LEAST_SCALE).half()
    if not bool(torch.isfinite(scale).all()):
        raise StoreError(
            f"{name} has values up to {float((high - low).max()):.1e}, too large for {fmt}'s float16 "
            f"scales; keep it with --policy '{name}=keep'"
        )
    wide = scale.float()
    zero = torch.round(-low / wide).clamp(0, top)
    codes = torch.round(values / wide[..., None]).add_(zero[..., None]).clamp_(0, top)
    packed = pack(codes.to(torch.uint8).view(-1, rows.shape[-1]), BITS[fmt])
    return packed, scale, zero.to(torch.uint8)


def decode_affine(spec: WeightSpec, parts: Mapping[str, Tensor]) -> Tensor:
    """float32 values of a weight, by definition."""
    columns = spec.shape[-1]
    data = parts["data"].reshape(-1)
    if spec.format == "int3":
        codes = unpack3(data.view(prod(spec.shape[:-1]), -1), columns).float()
    else:
        codes = data if spec.format == "int8g" else torch.stack((data >> 4, data & 15), dim=1)
        codes = codes.reshape(-1, columns).float()

    def wide(role: str) -> Tensor:
        part = parts[role].float().reshape(len(codes), -1)
        if f"block_{role}" in parts:
            blocks = parts[f"block_{role}"].float().reshape(len(codes), -1)
            part = part * blocks.repeat_interleave(part.shape[1] // blocks.shape[1], dim=1)
        return part.repeat_interleave(spec.blocksize, dim=1)

    if "offset" in parts:
        values = codes * wide("scale") + wide("offset")
    elif spec.format == "int8g":
        values = codes * wide("scale")
    else:
        zero = wide("zero") if "zero" in parts else 8
        values = (codes - zero) * wide("scale")
    if "order" in parts:
        values = torch.empty_like(values).index_copy_(1, parts["order"].long(), values)
    return values.reshape(spec.shape)


def affine_tail(pieces: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What follows the codes: (role, tensor), from the scales and zeros of all runs of rows."""
    yield "scale", torch.cat([scale for scale, _ in pieces])
    yield "zero", torch.cat([zero for _, zero in pieces])
