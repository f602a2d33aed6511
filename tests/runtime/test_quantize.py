import json

import pytest
import torch

from headrace.runtime.block_file import lay_out
from headrace.runtime.bnb import functional as bnb
from headrace.runtime.conversion.quantize import (
    STORE_DTYPES,
    decode,
    encode,
    encode_rows,
    parts_of,
    weight_spec,
)
from headrace.scheduler.errors import StoreError


def roundtrip(tensor, fmt, double_quant=False, name="x.weight"):
    """Encodes a weight and decodes it through its spec, as a reader of a store does."""
    stored = encode(name, tensor, fmt, double_quant=double_quant)
    shape = tuple(tensor.shape)
    parts = parts_of(name, STORE_DTYPES[tensor.dtype], shape, fmt, double_quant=double_quant)
    layout = lay_out(part.entry for part in parts)
    packed = stored.get(f"{name}.quant_state.bitsandbytes__nf4")
    state = None if packed is None else json.loads(bytes(packed.numpy()))
    spec = weight_spec(fmt, shape, parts, layout.tensors, state)
    by_role = {part.role: stored[part.entry.name] for part in parts}
    return decode(spec, {role: by_role[role] for role in spec.parts}, torch.float32)


@pytest.mark.parametrize("shape", [(3, 64), (40, 192), (5, 33), (4, 6, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_is_what_bitsandbytes_makes_and_reads(shape, dtype, double_quant):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed, state = bnb.quantize_4bit(
        weight.float(), blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    theirs = {"weight": packed} | {
        f"weight.{key}": value for key, value in state.as_dict(packed=True).items()
    }
    ours = encode("weight", weight, "nf4", double_quant=double_quant)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"weight.quant_state.bitsandbytes__nf4"}:
        assert torch.equal(ours[name], theirs[name]), name
    expected = bnb.dequantize_4bit(packed, state)
    got = roundtrip(weight, "nf4", double_quant)
    torch.testing.assert_close(got, expected.reshape(shape), rtol=1e-6, atol=1e-7)


def test_bitsandbytes_reads_our_state():
    weight = torch.randn(8, 128, dtype=torch.bfloat16)
    stored = encode("weight", weight, "nf4", double_quant=True)
    packed = stored.pop("weight")
    state = bnb.QuantState.from_dict(stored, device=torch.device("cpu"))
    assert (state.dtype, tuple(state.shape), state.blocksize) == (torch.bfloat16, (8, 128), 64)
    torch.testing.assert_close(
        bnb.dequantize_4bit(packed, state).float(),
        roundtrip(weight, "nf4", double_quant=True),
        rtol=1e-2,
        atol=1e-3,
    )


def test_int8_follows_llm_int8():
    weight = torch.randn(32, 96)
    data, scale, _ = bnb.int8_vectorwise_quant(weight.clone())
    stored = encode("x.weight", weight, "int8")
    assert list(stored) == ["x.weight", "x.SCB", "x.weight_format"]
    assert torch.equal(stored["x.weight"], data)
    assert torch.equal(stored["x.SCB"], scale)
    error = (roundtrip(weight, "int8") - weight).abs().amax(dim=1)
    assert bool((error <= scale / 254 * 1.001).all())


def test_rows_of_zeros_stay_zeros():
    weight = torch.zeros(4, 64)
    weight[1] = 1.0
    for fmt in ("int8", "nf4"):
        assert torch.equal(roundtrip(weight, fmt), weight)


@pytest.mark.parametrize(("fmt", "double_quant"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_runs_of_rows_give_the_same_bytes(fmt, double_quant):
    weight = torch.randn(200, 33)
    parts = parts_of("w.weight", "F32", (200, 33), fmt, double_quant=double_quant)
    whole = encode("w.weight", weight, fmt, double_quant=double_quant)
    pieces = {}
    runs = (weight[0:64], weight[64:192], weight[192:])
    for name, tensor in encode_rows(runs, parts, "F32", (200, 33), fmt):
        pieces.setdefault(name, []).append(tensor)
    for name, tensor in whole.items():
        together = pieces[name][0] if len(pieces[name]) == 1 else torch.cat(pieces[name])
        assert torch.equal(together, tensor), name


@pytest.mark.parametrize("fmt", ["int8", "nf4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_refused(fmt, bad):
    weight = torch.ones(2, 64)
    weight[1, 3] = bad
    with pytest.raises(StoreError, match=r"x\.weight holds NaN"):
        encode("x.weight", weight, fmt)


@pytest.mark.parametrize("fmt", ["raw", "int8", "nf4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_parts_say_the_sizes_beforehand(fmt, double_quant):
    weight = torch.randn(7, 65).bfloat16()
    for part in parts_of("x.weight", "BF16", (7, 65), fmt, double_quant=double_quant):
        tensor = encode("x.weight", weight, fmt, double_quant=double_quant)[part.entry.name]
        assert tuple(tensor.shape) == part.entry.shape
        assert STORE_DTYPES[tensor.dtype] == part.entry.dtype
