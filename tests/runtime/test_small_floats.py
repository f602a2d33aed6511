"""fp8, mxfp4 and nvfp4: values and products of a store's bytes, against the formats' definition."""

import pytest
import torch
import torch.nn.functional as F
from stored import packed_block
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from headrace.runtime.conversion.quantize import decode
from headrace.runtime.manifest import WeightSpec
from headrace.runtime.weights.view import view_weight
from headrace.runtime.weights.weight import Scratch

CPU = torch.device("cpu")
EXACT = {"rtol": 0, "atol": 0}


def blocks(shape: tuple[int, ...], height: int, width: int) -> dict[str, Tensor]:
    """Random codes in every magnitude but NaN, and a scale a block."""
    *stack, rows, columns = shape
    matrices = stack[0] if stack else 1
    data = torch.randn(matrices * rows, columns) * 2.0 ** torch.randint(-8, 7, (1, columns))
    scale = torch.rand(matrices * -(-rows // height), -(-columns // width)) + 0.01
    return {"data": data.clamp(-448, 448).to(torch.float8_e4m3fn), "scale": scale}


@pytest.mark.parametrize(
    ("height", "width"),
    [(48, 96), (1, 96), (32, 32), (32, 64), (20, 7)],
    ids=["tensor", "rows", "blocks", "last block short", "odd blocks"],
)
def test_fp8(height: int, width: int) -> None:
    torch.manual_seed(0)
    parts = blocks((48, 96), height, width)
    expected = torch.empty(48, 96)
    for r in range(48):
        for c in range(96):
            expected[r, c] = parts["data"][r, c].float() * parts["scale"][r // height, c // width]
    specs, block = packed_block(parts)
    spec = WeightSpec("fp8", (48, 96), specs, blocksize=width, block_rows=height)
    weight = view_weight(spec, block)
    torch.testing.assert_close(weight.dense(torch.float32), expected, **EXACT)
    torch.testing.assert_close(weight.dense(torch.bfloat16), expected.bfloat16(), **EXACT)
    torch.testing.assert_close(decode(spec, parts, torch.float32), expected, **EXACT)
    piece = weight.rows(5, 45).rows(2, 30)
    torch.testing.assert_close(piece.dense(torch.float32), expected[7:35], **EXACT)
    x, bias = torch.randn(5, 96), torch.randn(48)
    scratch = Scratch(10 * 96, torch.float32, CPU)
    torch.testing.assert_close(
        weight.linear(x, bias, scratch), F.linear(x, expected, bias), rtol=1e-4, atol=1e-2
    )


def test_stacked_fp8() -> None:
    torch.manual_seed(0)
    parts = blocks((3, 40, 64), 32, 32)
    specs, block = packed_block(parts)
    spec = WeightSpec("fp8", (3, 40, 64), specs, blocksize=32, block_rows=32)
    weight, expected = view_weight(spec, block), decode(spec, parts, torch.float32)
    assert expected.shape == (3, 40, 64)
    torch.testing.assert_close(weight.dense(torch.float32), expected, **EXACT)
    for e in range(3):
        expert = weight.expert(e)
        torch.testing.assert_close(expert.dense(torch.float32), expected[e], **EXACT)
        torch.testing.assert_close(expert.rows(33, 39).dense(torch.float32), expected[e, 33:39])


def test_mxfp4_is_what_transformers_reads() -> None:
    """A stack as gpt-oss has it, whose rows lie the other way round than in memory."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(256, (3, 48, 2, 16), dtype=torch.uint8, generator=generator)
    scale = torch.randint(100, 140, (3, 48, 2), dtype=torch.uint8, generator=generator)
    scale[0, 0] = 0
    expected = convert_moe_packed_tensors(stored, scale, dtype=torch.float32)  # [3, 64, 48]
    data = (stored << 4 | stored >> 4).reshape(-1, 1)
    parts = {"data": data, "scale": scale.view(-1, 2)}
    specs, block = packed_block(parts)
    spec = WeightSpec("mxfp4", (3, 64, 48), specs, blocksize=32, turned=True)
    weight = view_weight(spec, block)
    assert weight.shape == (3, 64, 48)
    torch.testing.assert_close(weight.dense(torch.float32), expected, **EXACT)
    torch.testing.assert_close(decode(spec, parts, torch.float32), expected, **EXACT)
    x = torch.randn(5, 64)
    scratch = Scratch(7 * 64, torch.float32, CPU)
    for e in range(3):
        expert = weight.expert(e)
        torch.testing.assert_close(expert.dense(torch.float32), expected[e], **EXACT)
        product = expert.linear(x, None, scratch, transposed=True)
        torch.testing.assert_close(product, x @ expected[e], rtol=1e-4, atol=1e-2)
        y = torch.randn(2, 48)
        torch.testing.assert_close(expert.linear(y), y @ expected[e].T, rtol=1e-4, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_gives_the_same_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    of_blocks = blocks((48, 96), 20, 7)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (48 * 32, 1), dtype=torch.uint8, generator=generator)
    powers = torch.randint(100, 140, (48, 2), dtype=torch.uint8, generator=generator)
    scales = torch.rand(48, 4, generator=generator).to(torch.float8_e4m3fn)
    rows = torch.rand(48, 1, generator=generator)
    for fmt, parts, shape, sizes in (
        ("fp8", of_blocks, (48, 96), {"blocksize": 7, "block_rows": 20}),
        ("mxfp4", {"data": codes, "scale": powers}, (48, 64), {"blocksize": 32}),
        ("nvfp4", {"data": codes, "scale": scales, "row_scale": rows}, (48, 64), {"blocksize": 16}),
    ):
        specs, block = packed_block(parts)
        spec = WeightSpec(fmt, shape, specs, **sizes)
        expected = view_weight(spec, block).dense(dtype)
        found = view_weight(spec, block.cuda()).dense(dtype)
        torch.testing.assert_close(found.cpu(), expected, **EXACT)
