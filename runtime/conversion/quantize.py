"""The byte formats of a weight: writing them (with bitsandbytes) and a reference that reads them.

Names and bytes are those that bitsandbytes' layers save and transformers reads:

    nf4   X.weight (U8 [n/2, 1], even element in the high nibble), .absmax, .quant_map,
          .nested_absmax and .nested_quant_map when the scales are quantized too, and
          .quant_state.bitsandbytes__nf4 (JSON as bytes)
    int8  X.weight (I8 [rows, columns]), X.SCB (F32 [rows], the largest magnitude of each row),
          X.weight_format (0: row-major)

int4, int3 and what else has scales of groups is in affine.py.

A weight is encoded in runs of rows, so that memory does not grow with the matrix.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from headrace.runtime.block_file import Entry
from headrace.runtime.conversion.affine import (
    AFFINE,
    BITS,
    GROUP_SIZE,
    affine_tail,
    decode_affine,
    encode_affine,
    int3_parts,
    int4_parts,
)
from headrace.runtime.conversion.part import Part
from headrace.runtime.conversion.small_floats import SMALL_FLOATS, decode_small_floats
from headrace.runtime.dtypes import name_of
from headrace.runtime.manifest import TensorSpec, WeightSpec
from headrace.scheduler.errors import StoreError

BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256
QUANTIZED = ("nf4", "int8", "int4", "int3")
STATE_BYTES = 256
"""The 4-bit state is JSON padded with spaces to this length, so that sizes are known beforehand."""

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
STORE_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

PART_SUFFIXES = {
    ".absmax": "absmax",
    ".quant_map": "code",
    ".nested_absmax": "nested_absmax",
    ".nested_quant_map": "nested_code",
    ".quant_state.bitsandbytes__nf4": "state",
    ".quant_state.bitsandbytes__fp4": "state",
}
"""What 4-bit checkpoints add to a weight's name, and the part that it holds."""


def parts_of(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    fmt: str,
    *,
    double_quant: bool = False,
    group_size: int = GROUP_SIZE,
) -> tuple[Part, ...]:
    """The tensors that encode weight `name` in format "raw" or one of QUANTIZED, in stored order."""
    if fmt == "raw":
        return (Part("data", Entry(name, dtype, shape)),)
    if fmt == "int8":
        rows, columns, stem = prod(shape[:-1]), shape[-1], name.removesuffix("weight")
        return (
            Part("data", Entry(name, "I8", (rows, columns))),
            Part("scale", Entry(f"{stem}SCB", "F32", (rows,))),
            Part("layout", Entry(f"{stem}weight_format", "U8", ())),
        )
    if fmt in BITS:
        return (int4_parts if fmt == "int4" else int3_parts)(name, shape, group_size)
    assert fmt == "nf4", fmt
    count = prod(shape)
    blocks = -(-count // BLOCKSIZE)
    parts = [
        Part("data", Entry(name, "U8", ((count + 1) // 2, 1))),
        Part("absmax", Entry(f"{name}.absmax", "U8" if double_quant else "F32", (blocks,))),
        Part("code", Entry(f"{name}.quant_map", "F32", (16,))),
        Part("state", Entry(f"{name}.quant_state.bitsandbytes__nf4", "U8", (STATE_BYTES,))),
    ]
    if double_quant:
        nested = -(-blocks // NESTED_BLOCKSIZE)
        parts[2:2] = [
            Part("nested_absmax", Entry(f"{name}.nested_absmax", "F32", (nested,))),
            Part("nested_code", Entry(f"{name}.nested_quant_map", "F32", (256,))),
        ]
    return tuple(parts)


def encode_rows(
    runs: Iterable[Tensor], parts: tuple[Part, ...], dtype: str, shape: tuple[int, ...], fmt: str
) -> Iterator[tuple[str, Tensor]]:
    """Yields (stored name, tensor) in stored order: the data run by run, then what else there is.

    `runs` are consecutive rows of the weight; each but the last has a multiple of 64 elements.
    Raises StoreError when the weight holds a NaN or an infinity.
    """
    names = {part.role: part.entry.name for part in parts}
    if fmt == "raw":
        for run in runs:
            yield names["data"], run.to(TORCH_DTYPES[parts[0].entry.dtype])
        return
    if fmt in BITS:
        yield from _affine_rows(runs, parts, fmt)
        return
    quantize = _int8 if fmt == "int8" else _nf4
    scales = []
    for run in runs:
        data, scale = quantize(run.float())
        if not bool(torch.isfinite(scale).all()):
            raise StoreError(f"{names['data']} holds NaN or infinity, which cannot be quantized")
        scales.append(scale)
        yield names["data"], data
    tail = _int8_tail if fmt == "int8" else nf4_tail
    for role, tensor in tail(torch.cat(scales), "nested_absmax" in names, dtype, shape):
        yield names[role], tensor


def _affine_rows(
    runs: Iterable[Tensor], parts: tuple[Part, ...], fmt: str
) -> Iterator[tuple[str, Tensor]]:
    names = {part.role: part.entry for part in parts}
    groups, tail = names["scale"].shape[-1], []
    for run in runs:
        data, scale, zero = encode_affine(run, names["data"].name, groups, fmt)
        tail.append((scale, zero))
        yield names["data"].name, data
    for role, tensor in affine_tail(tail):
        yield names[role].name, tensor


def _int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """LLM.int8()'s vector-wise rule: data = round(127 w / absmax) for each row."""
    rows = rows.reshape(-1, rows.shape[-1])
    scale = rows.abs().amax(dim=1)
    # A row of zeros stays one: its scale is zero, which must not become 0/0.
    inverse = 127.0 / scale.clamp(min=torch.finfo(torch.float32).tiny * 127)
    return torch.round(rows * inverse[:, None]).to(torch.int8), scale


def _int8_tail(
    scales: Tensor, double_quant: bool, dtype: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, Tensor]]:
    yield "scale", scales
    yield "layout", torch.zeros((), dtype=torch.uint8)


def _nf4(rows: Tensor) -> tuple[Tensor, Tensor]:
    # Imported late: it takes seconds. Importing it registers the operator.
    import headrace.runtime.bnb  # noqa: F401

    quantize = torch.ops.bitsandbytes.quantize_4bit.default
    packed, absmax = quantize(rows.reshape(-1), BLOCKSIZE, "nf4", torch.uint8)
    return packed, absmax


def nf4_table() -> Tensor:
    """The sixteen values of NF4, float32, ascending."""
    from headrace.runtime.bnb import functional

    table: Tensor = functional.get_4bit_type("nf4", device="cpu")
    return table


def double_quantized(absmax: Tensor) -> Tensor:
    """NF4's scales, float32 [blocks], as they are read when they are quantized, too."""
    from headrace.runtime.bnb import functional

    offset = absmax.mean()
    codes, state = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    scales: Tensor = functional.dequantize_blockwise(codes, state)
    return scales + offset


def nf4_tail(
    absmax: Tensor, double_quant: bool, dtype: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, Tensor]]:
    """What follows a weight's codes: (role, tensor), from its scales [blocks] float32."""
    from headrace.runtime.bnb import functional

    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCKSIZE,
        "dtype": name_of(TORCH_DTYPES[dtype]),
        "shape": list(shape),
    }
    if double_quant:
        offset = absmax.mean()
        absmax, nested = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
        state |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            "nested_offset": offset.item(),
        }
    yield "absmax", absmax
    if double_quant:
        yield "nested_absmax", nested.absmax
        yield "nested_code", nested.code
    yield "code", nf4_table()
    text = json.dumps(state).encode()
    assert len(text) <= STATE_BYTES, text
    yield "state", torch.frombuffer(bytearray(text.ljust(STATE_BYTES)), dtype=torch.uint8)


def encode(
    name: str,
    tensor: Tensor,
    fmt: str,
    *,
    double_quant: bool = False,
    group_size: int = GROUP_SIZE,
) -> dict[str, Tensor]:
    """Every stored tensor of a weight, by name, in stored order.

    >>> sorted(encode("q_proj.weight", torch.ones(2, 64), "int8"))
    ['q_proj.SCB', 'q_proj.weight', 'q_proj.weight_format']
    """
    dtype, shape = STORE_DTYPES[tensor.dtype], tuple(tensor.shape)
    parts = parts_of(name, dtype, shape, fmt, double_quant=double_quant, group_size=group_size)
    return dict(encode_rows([tensor], parts, dtype, shape, fmt))


def weight_spec(
    fmt: str,
    shape: tuple[int, ...],
    parts: Sequence[Part],
    tensors: Mapping[str, TensorSpec],
    state: Mapping[str, Any] | None = None,
) -> WeightSpec:
    """The manifest's record of a weight whose parts lie at `tensors`; `state` is the 4-bit one."""
    state = state or {}
    if fmt in (*AFFINE, "mxfp4", "nvfp4"):
        scales = next(part.entry.shape[-1] for part in parts if part.role == "scale")
        columns = shape[-2] if state.get("turned") else shape[-1]
        state = {**state, "blocksize": columns // scales}
    return WeightSpec(
        format=fmt,
        shape=shape,
        parts={
            part.role: tensors[part.entry.name]
            for part in parts
            if part.role not in ("state", "layout")
        },
        blocksize=state.get("blocksize", 0),
        nested_blocksize=state.get("nested_blocksize", 0),
        nested_offset=state.get("nested_offset", 0.0),
        block_rows=state.get("block_rows", 0),
        turned=state.get("turned", False),
        fp8_rows=state.get("fp8_rows", False),
    )


def decode(spec: WeightSpec, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight that `parts` encode, computed in float32 and rounded to `dtype` once."""
    data = parts["data"]
    if spec.format == "raw":
        return data.to(dtype)
    if spec.format == "int8":
        scaled = data.float() * (parts["scale"][:, None] / 127.0)
        return scaled.reshape(spec.shape).to(dtype)
    if spec.format in AFFINE:
        return decode_affine(spec, parts).to(dtype)
    if spec.format in SMALL_FLOATS:
        return decode_small_floats(spec, parts).to(dtype)
    count = prod(spec.shape)
    packed = data.reshape(-1)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[:count]
    scales = _scales(spec, parts).repeat_interleave(spec.blocksize)[:count]
    return (parts["code"][codes.int()] * scales).reshape(spec.shape).to(dtype)


def _scales(spec: WeightSpec, parts: Mapping[str, Tensor]) -> Tensor:
    absmax = parts["absmax"]
    if "nested_absmax" not in parts:
        return absmax
    nested = parts["nested_absmax"].repeat_interleave(spec.nested_blocksize)[: len(absmax)]
    return parts["nested_code"][absmax.int()] * nested + spec.nested_offset
