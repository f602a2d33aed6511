"""GGUF's blocks, against what the gguf package reads in them."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from headrace.runtime.conversion.gguf.blocks import BLOCK_TYPES, unpack


def blocks_of(name: str, rows: int, count: int) -> np.ndarray:
    """Random bytes, with scales that are ordinary numbers."""
    kind, rng = BLOCK_TYPES[name], np.random.default_rng(0)
    data = rng.integers(0, 256, (rows, count, kind.nbytes), dtype=np.uint8)
    scales = (rng.random((rows, count, 2)) * 0.1 + 0.01).astype(np.float16).view(np.uint8)
    first = 208 if name == "Q6_K" else 0
    number = 2 if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else 1
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
    want = torch.from_numpy(gguf.dequantize(data, kind_number))
    assert torch.equal(found.values(), want)
    squares, changed = found.squares()
    halves = replace(found, scale=found.scale.half())
    if found.offset is not None:
        halves = replace(halves, offset=found.offset.half())
    error = (halves.values() - want).double()
    assert squares == pytest.approx(float(want.double().square().sum()))
    assert changed == pytest.approx(float(error.square().sum()), rel=1e-3)
    assert (changed > 0) == (found.scale.dtype == torch.float32) == name.endswith("_K")
