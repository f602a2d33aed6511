"""int3 and quantized embedding tables: what is written and read, against their definition and plain stores."""

from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from commands import STORIES
from stored import packed_block, stored_weights
from transformers import AutoModelForCausalLM
from whole import WholeModel, compared

from headrace.runtime.conversion.convert import convert
from headrace.runtime.conversion.quantize import encode
from headrace.runtime.manifest import WeightSpec
from headrace.runtime.shape import model_shape
from headrace.runtime.store import Store
from headrace.runtime.weights.view import view_weight
from headrace.scheduler.errors import StoreError
from headrace.scheduler.plan import Slice


def by_hand(parts, shape, group):
    """float64, code by code from the bits."""
    columns = shape[-1]
    scale = parts["scale"].double().reshape(-1, columns // group)
    zero = parts["zero"].double().reshape(scale.shape)
    values = torch.empty(len(scale), columns, dtype=torch.float64)
    for row, data in enumerate(parts["data"].reshape(len(scale), -1).tolist()):
        bits = int.from_bytes(bytes(data), "little")
        for column in range(columns):
            code = bits >> (3 * column) & 7
            at = row, column // group
            values[row, column] = (code - zero[at]) * scale[at]
    return values.view(shape)


@pytest.mark.parametrize(
    ("shape", "group"), [((6, 128), 64), ((4, 640), 128), ((3, 4, 96), 32), ((5, 20), 20)]
)
def test_values_are_those_of_the_bits(shape, group):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.3
    found = encode("x.weight", weight, "int3", group_size=128 if group == 20 else group)
    parts = {name.rpartition(".")[2].replace("weight", "data"): t for name, t in found.items()}
    assert list(parts) == ["data", "scale", "zero"]
    assert parts["data"].numel() == weight.numel() // shape[-1] * 3 * -(-shape[-1] // 8)
    specs, block = packed_block(parts)
    read = view_weight(WeightSpec("int3", shape, specs, blocksize=group), block)
    expected = by_hand(parts, shape, group)
    torch.testing.assert_close(read.dense(torch.float32).double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        read.rows(1, 3).dense(torch.float32).double(), expected[1:3], rtol=0, atol=1e-6
    )
    step = parts["scale"].double().view(*shape[:-1], -1).repeat_interleave(group, -1)
    assert bool(((expected - weight).abs() <= 1.02 * step).all())


def test_what_cannot_be_int3_is_refused():
    with pytest.raises(StoreError, match="holds NaN"):
        encode("x.weight", torch.full((2, 64), float("nan")), "int3")
    with pytest.raises(StoreError, match=r"too large for int3's float16 scales; keep it"):
        encode("x.weight", torch.full((2, 64), 1e7), "int3")


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_a_store_gives_the_logits_of_its_values(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "src")
    options = {"group_size": 32, "allow_missing_tokenizer": True}
    store = convert(tmp_path / "src", tmp_path / "store", format="int3", **options)
    assert store.config["quantization_config"] == {"quant_method": "headrace", "format": "int3"}
    store.verify()
    logits, reference = compared(tmp_path / "store", tmp_path / "plain", model)
    assert float((logits - reference).norm() / reference.norm()) < 1e-5


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe"])
def test_experts_of_one_layer_may_have_formats_of_two_sizes(name: str, tmp_path: Path) -> None:
    """One by one, and in stacks; other layers have others."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "src")
    leaving = "down_proj" if name == "qwen3_moe" else "output_linear"
    policy = [
        ("*layers.0.*_proj.weight", "int4"),
        (f"*layers.1.*.{leaving}.weight", "int3"),
        ("*layers.1.*experts*" if name == "qwen3_moe" else "*layers.1.*input_linear*", "int8"),
        ("*embed_tokens*", "int8"),
    ]
    options = {"group_size": 32, "allow_missing_tokenizer": True, "policy": policy}
    convert(tmp_path / "src", tmp_path / "store", format="keep", **options)
    logits, reference = compared(tmp_path / "store", tmp_path / "plain", model)
    assert float((logits - reference).norm() / reference.norm()) < 1e-5


@pytest.mark.parametrize("fmt", ["int3", "int4", "int8", "nf4"])
@torch.inference_mode()
def test_a_tied_table_is_looked_up_and_multiplied_by_as_it_is_stored(fmt, tmp_path):
    policy = [("*embed_tokens*", fmt)]
    store = convert(STORIES, tmp_path / "store", format="keep", policy=policy)
    plain = Store.open(tmp_path / "store")
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    values = {n: w for block in plain.blocks for n, w in stored_weights(plain, block).items()}
    model.load_state_dict(values, strict=False)
    tokens = tuple(range(40, 90))
    expected = model(torch.tensor([tokens])).logits[0]
    found = WholeModel(store.path).logits([Slice(0, 0, tokens, (1,), None)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # transformers has no such tables, and must not try.
    assert store.config["quantization_config"]["quant_method"] == "headrace"
    # In host memory it is dequantized, on the device the head is packed.
    shape = model_shape(store, "bfloat16")
    assert shape.embed_bytes == 2 * 4096 * 256 and shape.tied_bytes == 0
    assert shape.head_bytes < 0.6 * shape.embed_bytes
