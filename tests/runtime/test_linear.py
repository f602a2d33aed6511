"""Weights in every format against their definition, whole and in pieces."""

import pytest
import torch
import torch.nn.functional as F
from stored import packed_block
from torch import Tensor, nn

from headrace.runtime.bnb import functional as bnb
from headrace.runtime.linear import QuantLinear
from headrace.runtime.manifest import WeightSpec
from headrace.runtime.weights.plain import Int8Weight, RawWeight
from headrace.runtime.weights.view import view_weight
from headrace.runtime.weights.weight import Scratch, Weight
from headrace.scheduler.errors import StoreError

CPU = torch.device("cpu")


def four_bit(values: Tensor, kind: str, nested: bool) -> tuple[Weight, Tensor]:
    packed, state = bnb.quantize_4bit(
        values, blocksize=64, quant_type=kind, compress_statistics=nested
    )
    parts = {"data": packed, "absmax": state.absmax, "code": state.code}
    extra = {}
    if nested:
        parts |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
        extra = {
            "nested_blocksize": state.state2.blocksize,
            "nested_offset": float(state.offset),
        }
    specs, block = packed_block(parts)
    spec = WeightSpec(kind, tuple(values.shape), specs, blocksize=64, **extra)
    return view_weight(spec, block), decode(packed, state).view(values.shape)


def decode(packed: Tensor, state: bnb.QuantState) -> Tensor:
    """By definition: bitsandbytes' own CPU kernel is wrong for rows of broken blocks."""
    absmax = state.absmax
    if state.nested:
        nested = state.state2
        scales = nested.absmax.repeat_interleave(nested.blocksize)[: len(absmax)]
        absmax = nested.code[absmax.long()] * scales + state.offset
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=-1).view(-1)
    return state.code[codes.long()] * absmax.repeat_interleave(state.blocksize)[: len(codes)]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(96, 128), (64, 96), (48, 640)])
def test_four_bit_equals_bitsandbytes(kind: str, nested: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, dense = four_bit(torch.randn(shape), kind, nested)
    torch.testing.assert_close(weight.dense(torch.float32), dense, rtol=0, atol=1e-6)
    step = weight.row_multiple
    for start in range(0, shape[0], 16):
        assert start % step == 0
        torch.testing.assert_close(
            weight.rows(start, start + 16).dense(torch.float32),
            dense[start : start + 16],
            rtol=0,
            atol=1e-6,
        )
    x = torch.randn(5, shape[1])
    torch.testing.assert_close(weight.linear(x), F.linear(x, dense), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("nested", [False, True])
def test_experts_are_slices_of_a_packed_stack(nested: bool) -> None:
    torch.manual_seed(0)
    weight, dense = four_bit(torch.randn(5, 24, 64), "nf4", nested)
    x = torch.randn(3, 24)
    for expert in range(5):
        piece = weight.expert(expert)
        assert piece.shape == (24, 64)
        torch.testing.assert_close(
            piece.linear(x, transposed=True), x @ dense[expert], rtol=1e-5, atol=1e-4
        )


def test_int8_scales_rows() -> None:
    torch.manual_seed(0)
    data = torch.randint(-127, 128, (6, 16), dtype=torch.int8)
    scale = torch.rand(6) + 0.5
    specs, block = packed_block({"data": data, "scale": scale})
    weight = view_weight(WeightSpec("int8", (6, 16), specs), block)
    dense = data.float() * scale[:, None] / 127
    torch.testing.assert_close(weight.dense(torch.float32), dense)
    torch.testing.assert_close(weight.dense(torch.bfloat16), dense.bfloat16())
    torch.testing.assert_close(weight.rows(2, 4).dense(torch.float32), dense[2:4])
    assert isinstance(weight, Int8Weight)


def test_raw_is_a_view_and_casts_when_asked() -> None:
    values = torch.randn(4, 8)
    specs, block = packed_block({"data": values})
    weight = view_weight(WeightSpec("raw", (4, 8), specs), block)
    dense = weight.dense(torch.float32)
    assert dense.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
    assert torch.equal(dense, values)
    assert torch.equal(weight.dense(torch.bfloat16), values.bfloat16())


def test_matrix_larger_than_the_scratch_is_multiplied_in_slices() -> None:
    torch.manual_seed(0)
    weight, dense = four_bit(torch.randn(96, 96), "nf4", True)
    x, bias = torch.randn(2, 3, 96), torch.randn(96)
    scratch = Scratch(10 * 96, torch.float32, CPU)
    torch.testing.assert_close(
        weight.linear(x, bias, scratch), F.linear(x, dense, bias), rtol=1e-5, atol=1e-4
    )


def test_unknown_format_is_refused() -> None:
    with pytest.raises(StoreError, match="convert again"):
        view_weight(WeightSpec("q3", (1,), {}), torch.zeros(8, dtype=torch.uint8))


def test_quant_linear_equals_linear() -> None:
    linear = nn.Linear(8, 4)
    module = QuantLinear(linear, Scratch(0, torch.float32, CPU))
    module.weight = RawWeight(linear.weight.detach())
    x = torch.randn(3, 8)
    assert torch.equal(module(x), linear(x))
    assert list(module.state_dict()) == ["bias"]
