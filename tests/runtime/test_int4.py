"""int4 and grouped int8: what is written, what is read, and products, against their definition."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from architectures import tiny_model
from stored import packed_block
from torch import Tensor
from whole import compared

from headrace.runtime.conversion.affine import decode_affine, encode_affine, group_of
from headrace.runtime.conversion.convert import convert
from headrace.runtime.conversion.plan import Options
from headrace.runtime.conversion.quantize import decode, encode
from headrace.runtime.manifest import WeightSpec
from headrace.runtime.weights.grouped import Int4Weight
from headrace.runtime.weights.view import view_weight
from headrace.runtime.weights.weight import Scratch
from headrace.scheduler.errors import StoreError

CPU = torch.device("cpu")
GROUP = 32


def made(
    kind: str, shape: tuple[int, ...], scales: torch.dtype, group: int = GROUP
) -> dict[str, Tensor]:
    """Random parts of a weight; `kind` names what there is beside codes and scales."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.Size(shape[:-1]).numel(), shape[-1]
    groups = (rows, columns // group)
    bits = torch.randint(256, (rows, columns), dtype=torch.uint8, generator=generator)
    eight = "int8g" in kind
    parts = {
        "data": bits.view(torch.int8) if eight else bits[:, : columns // 2].reshape(-1, 1),
        "scale": (torch.rand(groups, generator=generator) * 0.01 + 0.001).to(scales),
    }
    if "zero" in kind:
        parts["zero"] = torch.randint(17, groups, generator=generator).to(torch.uint8)
    if "offset" in kind:
        parts["offset"] = (torch.randn(groups, generator=generator) * 0.05).to(scales)
    if "order" in kind:
        parts["order"] = torch.randperm(columns, generator=generator).int()
    return parts


def by_hand(
    kind: str, shape: tuple[int, ...], parts: dict[str, Tensor], group: int = GROUP
) -> Tensor:
    """float64, one element after another's formula and nothing shared with the code under test."""
    columns = shape[-1]
    scale = parts["scale"].double().repeat_interleave(group, 1)
    if "int8g" in kind:
        codes = parts["data"].double()
    else:
        byte = parts["data"].view(len(scale), columns // 2).int()
        codes = torch.empty(len(scale), columns, dtype=torch.float64)
        codes[:, 0::2], codes[:, 1::2] = (byte // 16).double(), (byte % 16).double()
    if "offset" in kind:
        values = codes * scale + parts["offset"].double().repeat_interleave(group, 1)
    elif "zero" in kind:
        values = (codes - parts["zero"].double().repeat_interleave(group, 1)) * scale
    else:
        values = (codes if "int8g" in kind else codes - 8) * scale
    if "order" in kind:
        ordered = torch.empty_like(values)
        for j, column in enumerate(parts["order"].tolist()):
            ordered[:, column] = values[:, j]
        values = ordered
    return values.view(shape)


KINDS = ["int4", "int4 zero", "int4 offset", "int4 zero order", "int8g", "int8g offset"]


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_products(kind: str, scales: torch.dtype) -> None:
    shape = (48, 96)
    parts = made(kind, shape, scales)
    expected = by_hand(kind, shape, parts)
    specs, block = packed_block(parts)
    spec = WeightSpec(kind.split()[0], shape, specs, blocksize=GROUP)
    weight = view_weight(spec, block)
    exact = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(weight.dense(torch.float32).double(), expected, **exact)
    torch.testing.assert_close(decode(spec, parts, torch.float32).double(), expected, **exact)
    rounded = weight.dense(torch.bfloat16).float()
    torch.testing.assert_close(rounded, expected.float(), rtol=2**-8, atol=1e-6)
    piece = weight.rows(16, 40).dense(torch.float32).double()
    torch.testing.assert_close(piece, expected[16:40], **exact)
    x, bias = torch.randn(5, 96), torch.randn(48)
    product = F.linear(x, expected.float(), bias)
    for scratch in (None, Scratch(10 * 96, torch.float32, CPU), Scratch(0, torch.float32, CPU)):
        torch.testing.assert_close(weight.linear(x, bias, scratch), product, rtol=1e-4, atol=1e-5)
    y = torch.randn(3, 48)
    turned = weight.linear(y, transposed=True)
    torch.testing.assert_close(turned, y @ expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["int4 zero", "int4 offset", "int8g"])
def test_experts_are_slices_of_a_stack(kind: str) -> None:
    shape = (3, 16, 64)
    parts = made(kind, shape, torch.float16)
    expected = by_hand(kind, shape, parts).float()
    specs, block = packed_block(parts)
    stack = view_weight(WeightSpec(kind.split()[0], shape, specs, blocksize=GROUP), block)
    for e in range(3):
        expert = stack.expert(e)
        torch.testing.assert_close(expert.dense(torch.float32), expected[e], rtol=0, atol=1e-6)
    torch.testing.assert_close(stack.dense(torch.float32), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["int4", "int4 zero"])
def test_the_kernel_is_given_the_same_values(kind: str) -> None:
    parts = made(kind, (48, 96), torch.float16)
    specs, block = packed_block(parts)
    weight = view_weight(WeightSpec("int4", (48, 96), specs, blocksize=GROUP), block)
    assert isinstance(weight, Int4Weight)
    codes = weight.rows(8, 40).codes()
    packed = codes.packed.view(32, 48).int()
    numbers = torch.stack((packed // 16, packed % 16), -1).view(32, 96 // GROUP, GROUP)
    zeros = 8 if codes.zeros is None else codes.zeros.int().view(32, -1, 1)
    values = (numbers - zeros) * codes.scales.float().view(32, -1, 1)
    assert codes.scales.dtype == torch.float16 and codes.shape == (32, 96)
    expected = by_hand(kind, (48, 96), parts)[8:40]
    torch.testing.assert_close(values.view(32, 96).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("kind", ["int4", "int4 zero", "int4 zero order", "int4 offset"])
def test_products_on_cuda(kind: str, group: int) -> None:
    """Few rows by the kernel where it has one for the weight, many by dequantizing."""
    shape = (256, 1024)
    parts = made(kind, shape, torch.float16, group)
    expected = by_hand(kind, shape, parts, group).cuda()
    specs, block = packed_block(parts)
    weight = view_weight(WeightSpec("int4", shape, specs, blocksize=group), block.cuda())
    dense = weight.dense(torch.float32).double()
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-6)
    for rows in (1, 4, 16, 200):
        x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
        product = x.double() @ expected.T
        error = (weight.linear(x).double() - product).norm() / product.norm()
        assert float(error) < 1e-2, rows


def test_many_rows_are_dequantized_in_runs() -> None:
    """More elements than are dequantized at a time."""
    parts = made("int4 zero", (1030, 256), torch.float16)
    expected = by_hand("int4 zero", (1030, 256), parts)
    specs, block = packed_block(parts)
    weight = view_weight(WeightSpec("int4", (1030, 256), specs, blocksize=GROUP), block)
    torch.testing.assert_close(weight.dense(torch.float32).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_encoding_is_off_by_half_a_step(dtype: torch.dtype, group: int) -> None:
    weight = (torch.randn(24, 256, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    weight[3, :group] = 0
    weight[4, :group] = 1e-7  # below float16's least scale times 15
    weight[5, :group] = 0.25  # a single value
    groups = 256 // group
    packed, scale, zero = encode_affine(weight, "w", groups, "int4")
    parts = {"data": packed, "scale": scale, "zero": zero}
    specs, _ = packed_block(parts)
    back = decode_affine(WeightSpec("int4", (24, 256), specs, blocksize=group), parts)
    error = (back - weight.float()).abs().view(24, groups, group).amax(-1)
    # Half a step; at the ends of a range more by what float16 took from the step, and the zero
    # point's rounding shifts both ends.
    assert bool((error <= scale.float() * 1.02).all())
    assert float((error / scale.float()).mean()) < 0.7
    assert not back[3, :group].any()


def test_what_cannot_be_int4_is_refused() -> None:
    with pytest.raises(StoreError, match=r"x\.weight holds NaN"):
        encode("x.weight", torch.full((2, 64), float("nan")), "int4")
    with pytest.raises(StoreError, match=r"too large for int4's float16 scales; keep it"):
        encode("x.weight", torch.full((2, 64), 1e7), "int4")
    with pytest.raises(StoreError, match=r"rows of 33 columns, an odd number"):
        encode("x.weight", torch.ones(2, 33), "int4")
    with pytest.raises(StoreError, match="a group size is part of int4 and int3, not of nf4"):
        Options("nf4", group_size=64)
    with pytest.raises(StoreError, match="groups of 32, 64, 128 columns, not of 48"):
        Options("int4", group_size=48)


def test_groups_divide_rows() -> None:
    assert [group_of(n, 128) for n in (4096, 2880, 5664, 96, 80)] == [128, 64, 32, 32, 80]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_a_store_gives_the_logits_of_its_values(name: str, tmp_path: Path) -> None:
    """q, k and v, gate and up, experts one by one and in a stack, whose rows are the inputs."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "src")
    store = convert(
        tmp_path / "src", tmp_path / "store", format="int4", group_size=32,
        allow_missing_tokenizer=True,
    )  # fmt: skip
    assert store.format == "int4"
    assert store.config["quantization_config"] == {"quant_method": "headrace", "format": "int4"}
    store.verify()
    logits, reference = compared(tmp_path / "store", tmp_path / "plain", model)
    assert float((logits - reference).norm() / reference.norm()) < 1e-5
