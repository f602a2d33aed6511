"""Weights packed for the CPU's 4-bit kernel: the layout, and products against float64."""

from pathlib import Path

import pytest
import torch
from architectures import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM
from whole import WholeModel

from headrace.runtime.bnb import functional as bnb
from headrace.runtime.conversion.convert import convert
from headrace.runtime.conversion.quantize import STORE_DTYPES
from headrace.runtime.manifest import TensorSpec, WeightSpec
from headrace.runtime.matmul.packed_cpu import (
    FEW_SEQUENCES,
    MOST_ROWS,
    PackedLayout,
    choose_layout,
    has_kernel,
)
from headrace.runtime.weights.view import view_weight
from headrace.runtime.weights.weight import Scratch, Weight
from headrace.scheduler.plan import Slice

CPU = torch.device("cpu")
LAYOUT = PackedLayout(64)

kernel = pytest.mark.skipif(not has_kernel(), reason="needs AVX-512 bf16 and bitsandbytes' kernel")


def quantized(
    shape: tuple[int, ...], kind: str = "nf4", nested: bool = False, blocksize: int = 64
) -> tuple[WeightSpec, Tensor, Tensor]:
    """A random weight's place in a block, the block, and its values in float64."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator) * torch.rand(shape[-1], generator=generator)
    packed, state = bnb.quantize_4bit(
        values, blocksize=blocksize, quant_type=kind, compress_statistics=nested
    )
    parts, scales, extra = {"data": packed, "absmax": state.absmax}, state.absmax, {}
    if nested:
        inner = state.state2
        parts |= {"nested_absmax": inner.absmax, "nested_code": inner.code}
        extra = {"nested_blocksize": inner.blocksize, "nested_offset": float(state.offset)}
        outer = inner.absmax.repeat_interleave(inner.blocksize)[: len(scales)]
        scales = inner.code[scales.long()] * outer + state.offset
    specs, data = {}, bytearray()
    for name, tensor in parts.items():
        where = (STORE_DTYPES[tensor.dtype], tuple(tensor.shape), len(data), tensor.nbytes)
        specs[name] = TensorSpec(*where)
        data += tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        data += bytes(-len(data) % 256)
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=-1).view(-1).long()
    dense = (state.code[codes].double().view(-1, blocksize) * scales.double()[:, None]).view(shape)
    spec = WeightSpec(kind, shape, specs, blocksize=blocksize, **extra)
    return spec, torch.frombuffer(data, dtype=torch.uint8), dense


def packed_weight(spec: WeightSpec, block: Tensor, layout: PackedLayout = LAYOUT) -> Weight:
    assert layout.takes(spec)
    layout.pack(spec, block)
    return layout.view(spec, block)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", [(32, 64), (96, 192), (640, 2048)])
def test_layout_is_that_of_bitsandbytes(shape: tuple[int, int]) -> None:
    spec, block, dense = quantized(shape)
    packed, state = bnb.quantize_4bit(dense.float(), blocksize=64, quant_type="nf4")
    state.shape = torch.Size(shape)
    data = spec.parts["data"]
    before = block[data.offset : data.offset + data.nbytes].clone()
    want, want_state = bnb._convert_weight_packed_for_cpu(before, state)
    LAYOUT.pack(spec, block)
    assert torch.equal(block[data.offset : data.offset + data.nbytes], want.view(-1))
    scales = spec.parts["absmax"]
    half = block[scales.offset : scales.offset + scales.nbytes // 2].view(torch.bfloat16)
    torch.testing.assert_close(half.view(want_state.absmax.shape), want_state.absmax)
    assert len(packed) == len(before)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(32, 64), (96, 192), (2080, 1088)])
def test_values_are_put_back_in_order(shape: tuple[int, int], nested: bool) -> None:
    spec, block, dense = quantized(shape, nested=nested)
    weight = packed_weight(spec, block)
    # Scales of 8 bits instead of 24, unless they are quantized themselves.
    limit = 1e-6 if nested else 2.0**-8
    want = dense.abs() * limit + 1e-7
    assert bool(((weight.dense(torch.float32).double() - dense).abs() <= want).all())
    piece = weight.rows(32, 96) if shape[0] >= 96 else weight
    part = dense[32:96] if shape[0] >= 96 else dense
    assert error(piece.dense(torch.float32), part) < 2.0**-8
    scratch = Scratch(64 * shape[1], torch.bfloat16, CPU)
    x = torch.randn(100, shape[1])
    assert error(weight.linear(x.bfloat16(), None, scratch), x.double() @ dense.T) < 0.01


@kernel
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 33, 64])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(32, 64), (96, 320), (512, 2048), (160, 1088)])
def test_product_equals_float64(shape: tuple[int, int], nested: bool, rows: int) -> None:
    spec, block, dense = quantized(shape, nested=nested)
    x = torch.randn(rows, shape[1]).bfloat16()
    bias = torch.randn(shape[0]).bfloat16()
    want = x.double() @ dense.T
    reference = view_weight(spec, block).linear(x)
    weight = packed_weight(spec, block)
    got = weight.linear(x)
    assert got.shape == want.shape
    # As far from the truth as dequantized weights in bfloat16, plus the rounding of scales.
    assert error(got, want) < max(1.5 * error(reference, want), 0.005)
    torch.testing.assert_close(weight.linear(x[None], bias), (got + bias)[None])


@kernel
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024])
def test_every_blocksize(blocksize: int, kind: str) -> None:
    spec, block, dense = quantized((64, 2048), kind, blocksize=blocksize)
    x = torch.randn(3, 2048).bfloat16()
    assert error(packed_weight(spec, block).linear(x), x.double() @ dense.T) < 0.006


@kernel
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("rows", [1, 6, 70])
def test_experts_are_slices_of_a_packed_stack(nested: bool, rows: int) -> None:
    spec, block, dense = quantized((5, 64, 192), nested=nested)
    weight, x = packed_weight(spec, block), torch.randn(rows, 192).bfloat16()
    for expert in range(5):
        piece = weight.expert(expert)
        assert piece.shape == (64, 192)
        assert error(piece.linear(x), x.double() @ dense[expert].T) < 0.006
        y = torch.randn(rows, 64).bfloat16()
        got = piece.linear(y, transposed=True)
        assert error(got, y.double() @ dense[expert]) < 0.006


@pytest.mark.parametrize("shape", [(33, 64), (64, 96), (64,)])
def test_other_shapes_stay_in_their_order(shape: tuple[int, ...]) -> None:
    spec, block, dense = quantized(shape)
    assert not LAYOUT.takes(spec)
    assert error(LAYOUT.view(spec, block).dense(torch.float32), dense) < 1e-6


def test_only_bfloat16_and_few_sequences_are_packed_for() -> None:
    assert choose_layout(CPU, torch.float32, 1) is None
    assert choose_layout(torch.device("cuda"), torch.bfloat16, 1) is None
    assert choose_layout(CPU, torch.bfloat16, 1 << 20) is None


@kernel
@pytest.mark.parametrize("sequences", [1, FEW_SEQUENCES])
def test_few_sequences_are_packed(sequences: int) -> None:
    assert choose_layout(CPU, torch.bfloat16, sequences) == PackedLayout(MOST_ROWS)
    assert choose_layout(CPU, torch.bfloat16, FEW_SEQUENCES + 1) is None


@kernel
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt_oss"])
def test_packed_model_decodes_the_same_tokens(architecture: str, tmp_path: Path) -> None:
    """Greedy, in bfloat16, against float32: packed weights are as near to it as dequantized ones."""
    config = tiny_config(architecture, hidden_size=256, intermediate_size=640, head_dim=64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "checkpoint")
    store = tmp_path / "store"
    convert(tmp_path / "checkpoint", store, format="nf4", allow_missing_tokenizer=True)
    exact = WholeModel(store, dtype=torch.float32)
    plain = WholeModel(store, dtype=torch.bfloat16)
    packed = WholeModel(store, dtype=torch.bfloat16, layout=LAYOUT)
    tokens, done = list(range(3, 20)), 0
    errors, agree = [], [0, 0]
    while len(tokens) < 60:
        piece = [Slice(0, done, tuple(tokens[done:]), (0,), None)]
        want, *got = (model.logits(piece)[-1].double() for model in (exact, plain, packed))
        errors.append([error(logits, want) for logits in got])
        best = int(want.argmax())
        agree = [n + int(logits.argmax() == best) for n, logits in zip(agree, got, strict=True)]
        done = len(tokens)
        tokens.append(best)
    # The median: a router's tie, decided the other way, is a jump for either of them.
    median = torch.tensor(errors).median(dim=0).values
    assert median[1] < 1.4 * median[0], median
    assert agree[1] >= min(agree[0], len(errors) - 2), agree
