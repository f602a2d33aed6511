"""FP8 weights multiplied by rows in FP8: against float64 with the same rounding, and as checkpoints ask for it."""

from pathlib import Path

import pytest
import torch
from foreign import Quantizer, compressed_tensors, compressed_tensors_settings, fp8, write
from interpreter import DEVICES
from stored import packed_block
from torch import Tensor

from headrace.runtime.conversion.convert import convert
from headrace.runtime.manifest import WeightSpec
from headrace.runtime.matmul.fp8 import (
    BLOCK,
    FP8,
    LEAST_CAPABILITY,
    Scales,
    multiplied_by,
    scales_of,
)
from headrace.runtime.weights.blocks import Fp8Weight
from headrace.runtime.weights.view import view_weight

SETTINGS = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def by_definition(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Rows in FP8 and their scales [M, K / group]."""
    groups = x.float().view(len(x), -1, group)
    scale = groups.abs().amax(-1).clamp(min=1e-12) / 448
    return (groups / scale[..., None]).view(x.shape).to(FP8), scale


def unrounded(rounded: Tensor, scale: Tensor) -> Tensor:
    wide = scale.double().repeat_interleave(rounded.shape[1] // scale.shape[1], 1)
    return rounded.double() * wide


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("columns", "group"), [(256, 256), (640, 640), (384, BLOCK)])
def test_rounded_rows(device: str, columns: int, group: int) -> None:
    from headrace.runtime.matmul.fp8_triton import round_rows

    torch.manual_seed(0)
    wide = torch.randn(5, columns + 16, device=device, dtype=torch.bfloat16) * 7
    if device == "cpu":
        # Triton's interpreter (3.7) rounds halves up, and to powers of two wrongly: nothing to round here.
        wide = wide.to(FP8).bfloat16()
        wide[:, ::BLOCK] = 448
    x = wide[:, :columns]
    x[3] = 0
    found, scales = round_rows(x, 16, group)
    assert found.shape == (16, columns) and scales.shape == (16, columns // group)
    expected, scale = by_definition(x.reshape(5, columns), group)
    torch.testing.assert_close(scales[:5], scale, rtol=1e-6, atol=0)
    assert torch.equal(found[:5].float(), expected.float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [(1, 2500), (40, 2500), (16, 7)])
def test_values_of_every_code(device: str, block: tuple[int, int]) -> None:
    """Subnormal ones and NaN, too, whole and from within a block."""
    from headrace.runtime.matmul.fp8_triton import values

    torch.manual_seed(0)
    codes = torch.randint(256, (40, 2500), dtype=torch.uint8)
    codes[:, :256] = torch.arange(256, dtype=torch.uint8)
    data, (height, width) = codes.view(FP8), block
    scale = torch.rand(-(-40 // height), -(-2500 // width)) + 0.1
    wide = scale.repeat_interleave(height, 0)[:40].repeat_interleave(width, 1)[:, :2500]
    short = torch.float16 if device == "cpu" else torch.bfloat16  # which the interpreter cuts off
    for first, dtype in ((0, torch.float32), (9, torch.float32), (9, short)):
        expected = (data.float() * wide)[first:].to(dtype)
        out = torch.empty(expected.shape, dtype=dtype, device=device)
        values(data[first:].to(device), scale.to(device), block, first, out)
        torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def weight(rows: int, columns: int, height: int, width: int, device: str) -> tuple[Fp8Weight, Tensor]:  # fmt: skip
    """A weight whose checkpoint quantizes activations, and its values."""
    torch.manual_seed(rows)
    scale = torch.rand(-(-rows // height), -(-columns // width)) + 0.1
    parts = {"data": torch.randn(rows, columns).to(FP8), "scale": scale}
    specs, block = packed_block(parts)
    spec = WeightSpec(
        "fp8", (rows, columns), specs, blocksize=width, block_rows=height, fp8_rows=True
    )
    found = view_weight(spec, block.to(device))
    assert isinstance(found, Fp8Weight)
    return found, found.dense(torch.float32).double()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("rows", [1, 3, 16, 40, 300])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((768, 512), (1, 512)),
        ((768, 512), (768, 512)),
        ((768, 512), (128, 128)),
        ((576, 7168), (128, 128)),  # the last block of rows is half a one
    ],
    ids=["rows", "one scale", "blocks", "a block short"],
)
def test_products(rows: int, shape: tuple[int, int], block: tuple[int, int]) -> None:
    """Everything but the last rounding to bfloat16, and the tensor cores' sums of rows, is exact."""
    stored, dense = weight(*shape, *block, "cuda")
    scales = scales_of(shape, block)
    assert scales is not None
    # By what the hardware has, so that nothing is passed over because trying it failed.
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY or (scales is Scales.BLOCKS and capability != (9, 0)):
        pytest.skip("not on this device")
    assert scales in multiplied_by(torch.device("cuda", 0))
    x = torch.randn(2, rows, shape[1], device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(shape[0], device="cuda", dtype=torch.bfloat16)
    group = BLOCK if scales is Scales.BLOCKS else shape[1]
    expected = unrounded(*by_definition(x.view(-1, shape[1]), group)) @ dense.T
    expected = expected.view(2, rows, -1)
    out = stored.linear(x, bias)
    assert out.dtype == torch.bfloat16 and out.shape == expected.shape
    error = (out.double() - expected - bias.double()).norm() / expected.norm()
    assert error < 5e-3, error.item()
    other, _ = weight(256, shape[1], block[0] if block[0] in (1, BLOCK) else 256, block[1], "cuda")
    pair = stored.together([other], x, [bias, None])
    assert pair is not None
    assert torch.equal(pair[0], out) and torch.equal(pair[1], other.linear(x))
    # Others are dequantized: runs of rows, and activations that are not bfloat16.
    part = stored.rows(16, 48).linear(x)
    exact = x.double() @ dense[16:48].T
    assert (part.double() - exact).norm() / exact.norm() < 5e-3
    wide = stored.linear(x.float())
    assert (wide.double() - x.double() @ dense.T).norm() / expected.norm() < 1e-3


def test_sizes() -> None:
    assert scales_of((768, 512), (1, 512)) is Scales.ROWS
    assert scales_of((8, 768, 512), (768, 512)) is Scales.ROWS
    assert scales_of((576, 512), (128, 128)) is Scales.BLOCKS
    assert scales_of((768, 512), (32, 32)) is None  # no such blocks
    assert scales_of((768, 500), (1, 500)) is None
    assert scales_of((100, 512), (1, 512)) is None
    assert scales_of((768, 192), (128, 128)) is None
    assert scales_of((128, 512), (128, 128)) is None
    assert scales_of((768, 640), (128, 128)) is None


def test_not_on_a_cpu() -> None:
    stored, dense = weight(64, 128, 1, 128, "cpu")
    assert multiplied_by(torch.device("cpu")) == frozenset()
    x = torch.randn(3, 128).bfloat16()
    assert torch.equal(stored.linear(x), x @ dense.bfloat16().T)
    assert stored.together([stored], x, [None, None]) is None


def weights_only() -> tuple[dict[str, object], Quantizer]:
    settings = compressed_tensors_settings("float-quantized")
    return settings, compressed_tensors("float-quantized", 8, None, True)


def with_activations() -> tuple[dict[str, object], Quantizer]:
    settings, quantizer = weights_only()
    dynamic = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    group = settings["config_groups"]["group_0"] | {"input_activations": dynamic}  # type: ignore[index]
    return settings | {"config_groups": {"group_0": group}}, quantizer


@pytest.mark.parametrize(
    ("checkpoint", "asked"),
    [
        ((SETTINGS, fp8(None, "scale")), True),
        (({"quant_method": "fp8"}, fp8(None, "scale")), False),
        (with_activations(), True),
        (weights_only(), False),
    ],
    ids=["fp8", "fp8, weights only", "compressed-tensors", "compressed-tensors, weights only"],
)
def test_the_checkpoint_asks_for_it(
    checkpoint: tuple[dict[str, object], Quantizer], asked: bool, tmp_path: Path
) -> None:
    quantized, _ = write(tmp_path, "llama", *checkpoint)
    store = convert(quantized, tmp_path / "store", format="keep", allow_missing_tokenizer=True)
    found = {
        spec.fp8_rows
        for block in store.layers
        for spec in block.weights.values()
        if spec.format == "fp8"
    }
    assert found == {asked}
