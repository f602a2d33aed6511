"""GGUF's blocks, against what the gguf package reads in them."""

import gguf
import numpy as np
import pytest
import torch

from headrace.runtime.conversion.gguf.blocks import BLOCK_TYPES, unpack, unpack_mxfp4
from headrace.runtime.conversion.quantize import STORE_DTYPES
from headrace.runtime.weights.affine import Numbers, int4_values, int8_values
from headrace.runtime.weights.small_floats import exponents, float4_values

SCALES_AT = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}


def blocks_of(name: str, rows: int, count: int) -> np.ndarray:
    """Random bytes, with scales that are ordinary numbers."""
    kind, rng = BLOCK_TYPES[name], np.random.default_rng(0)
    data = rng.integers(0, 256, (rows, count, kind.nbytes), dtype=np.uint8)
    scales = (rng.random((rows, count, 2)) * 0.1 + 0.01).astype(np.float16).view(np.uint8)
    first = SCALES_AT.get(name, 0)
    number = 2 if kind.has_offset else 1
    data[..., first : first + 2 * number] = scales[..., : 2 * number]
    return data.reshape(rows, -1)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_values_are_those_of_the_gguf_package(name: str) -> None:
    kind, data = BLOCK_TYPES[name], blocks_of(name, 6, 5)
    kind_number = gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[kind_number] == (kind.elements, kind.nbytes)
    found = unpack(kind, torch.from_numpy(data))
    assert (found.offset is not None) == kind.has_offset
    assert found.codes.dtype == (torch.uint8 if kind.bits == 4 else torch.int8)
    assert found.codes.shape == (6, 5 * kind.elements)
    assert found.scale.shape == (6, 5 * kind.elements // kind.group)
    parts = dict(found.parts())
    assert [(r, STORE_DTYPES[p.dtype], p.shape[1]) for r, p in parts.items()] == list(
        kind.parts(5 * kind.elements)
    )
    want = torch.from_numpy(gguf.dequantize(data, kind_number))
    scale = Numbers(found.scale, found.block_scale)
    offset = None if found.offset is None else Numbers(found.offset, found.block_offset)
    out = torch.empty_like(want)
    if kind.bits == 8:
        int8_values(found.codes, scale, offset, out)
    else:
        packed = found.codes[:, ::2] << 4 | found.codes[:, 1::2]
        int4_values(packed, scale, None, offset, out)
    assert torch.equal(out, want)


def test_values_of_mxfp4() -> None:
    """Also of powers that float32 holds as subnormal numbers."""
    data = np.random.default_rng(0).integers(0, 256, (6, 5, 17), dtype=np.uint8)
    data[..., 0] = np.arange(30).reshape(6, 5) * 8
    data[0, :2, 0] = 0, 1
    data = data.reshape(6, -1)
    codes, scale = unpack_mxfp4(torch.from_numpy(data))
    packed = codes[:, ::2] << 4 | codes[:, 1::2]
    values = float4_values(packed, lambda run: exponents(scale[run]), torch.empty(codes.shape))
    want = gguf.dequantize(data, gguf.GGMLQuantizationType.MXFP4)
    assert torch.equal(values, torch.from_numpy(want))
