"""Quantized checkpoints of other tools: a store gives the logits of a plain model with their values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from foreign import (
    GROUP,
    Quantized,
    awq,
    compressed_tensors,
    compressed_tensors_settings,
    fp4,
    fp8,
    gptq,
    write,
    write_gpt_oss,
)
from rich.console import Console
from safetensors.torch import load_file, save_file
from stored import stored_weights
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from whole import WholeModel

from headrace.cluster.cli.convert import run_convert
from headrace.runtime.conversion.convert import convert
from headrace.runtime.conversion.writer import Progress
from headrace.runtime.store import Store
from headrace.scheduler.errors import StoreError
from headrace.scheduler.plan import Slice

PROMPT = tuple(range(3, 40))
FUSED = ("llama", "phi3", "mixtral")
"""q, k, v, gate and up as modules that take one input; fused on disk; in every expert of a mixture."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def kept(checkpoint: Path) -> Store:
    dest = checkpoint.parent / "store"
    store = convert(checkpoint, dest, format="keep", allow_missing_tokenizer=True)
    store.verify()
    return store


@torch.inference_mode()
def check(store: Store, plain: Path, fmt: str) -> None:
    """The store's values are the plain checkpoint's and its logits those of transformers with them."""
    assert store.format == fmt
    assert store.config["quantization_config"] == {"quant_method": "headrace", "format": fmt}
    assert list(store.blocks[1].weights.values())[-1].format == fmt
    expected = load_file(plain / "model.safetensors")
    stored = {n: w for block in store.blocks for n, w in stored_weights(store, block).items()}
    assert stored.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(stored[name], values, rtol=0, atol=1e-6, msg=name)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    reference = model(torch.tensor([PROMPT])).logits[0]
    logits = WholeModel(store.path).logits([Slice(0, 0, PROMPT, (1,), None)])
    assert float((logits - reference).norm() / reference.norm()) < 1e-3


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}


@pytest.mark.parametrize("model_type", FUSED)
def test_gptq(model_type: str, tmp_path: Path) -> None:
    settings = GPTQ | {"desc_act": False, "checkpoint_format": "gptq"}
    quantized, plain = write(tmp_path, model_type, settings, gptq(4, less=1, act_order=False))
    check(kept(quantized), plain, "int4")


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_zero_points_that_borrow(bits: int, tmp_path: Path) -> None:
    """Rows without negative values have zero points of 0, which less one take from their neighbours'."""
    quantize = gptq(bits, less=1, act_order=False)
    settings = GPTQ | {"bits": bits, "desc_act": False}
    quantized, plain = write(
        tmp_path, "llama", settings, lambda w: quantize(torch.cat((w[:2].abs(), w[2:])))
    )
    check(kept(quantized), plain, "int4" if bits == 4 else "int8g")


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_v2_with_act_order(bits: int, tmp_path: Path) -> None:
    settings = GPTQ | {"bits": bits, "desc_act": True, "checkpoint_format": "gptq_v2"}
    quantized, plain = write(tmp_path, "llama", settings, gptq(bits, less=0, act_order=True))
    store = kept(quantized)
    check(store, plain, "int4" if bits == 4 else "int8g")
    specs = store.layers[0].weights
    assert "order" in specs["model.layers.0.self_attn.q_proj.weight"].parts


def test_columns_out_of_order_must_be_announced(tmp_path: Path) -> None:
    settings = GPTQ | {"desc_act": False}
    quantized, _ = write(tmp_path, "llama", settings, gptq(4, less=1, act_order=True))
    with pytest.raises(StoreError, match=r"columns out of order, but .* has desc_act false"):
        kept(quantized)


@pytest.mark.parametrize("model_type", FUSED)
def test_awq(model_type: str, tmp_path: Path) -> None:
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    quantized, plain = write(tmp_path, model_type, settings, awq)
    check(kept(quantized), plain, "int4")


@pytest.mark.parametrize(
    ("layout", "fmt", "bits", "group", "symmetric"),
    [
        ("pack-quantized", "int4", 4, GROUP, True),
        ("pack-quantized", "int4", 4, GROUP, False),
        ("pack-quantized", "int8g", 8, None, True),
        ("pack-quantized", "int8g", 8, GROUP, False),
        ("pack-quantized", "int8g", 8, 0, False),
        ("int-quantized", "int8g", 8, None, True),
        ("int-quantized", "int8g", 8, None, False),
        ("int-quantized", "int8g", 8, GROUP, True),
        ("int-quantized", "int8g", 8, 0, False),
        ("float-quantized", "fp8", 8, None, True),
        ("float-quantized", "fp8", 8, 0, True),
    ],
)
def test_compressed_tensors(
    layout: str, fmt: str, bits: int, group: int | None, symmetric: bool, tmp_path: Path
) -> None:
    """Groups, rows (None) and one scale for all (0), of experts' matrices among others."""
    settings = compressed_tensors_settings(layout)
    quantize = compressed_tensors(layout, bits, group, symmetric)
    quantized, plain = write(tmp_path, "mixtral", settings, quantize)
    check(kept(quantized), plain, fmt)


def test_compressed_tensors_with_columns_out_of_order(tmp_path: Path) -> None:
    """Act-order, of early releases."""

    quantize = compressed_tensors("pack-quantized", 4, GROUP, False, act_order=True)
    settings = compressed_tensors_settings("pack-quantized")
    quantized, plain = write(tmp_path, "llama", settings, quantize)
    check(kept(quantized), plain, "int4")


@pytest.mark.parametrize("block", [(32, 32), (40, 64), None], ids=["whole", "broken", "tensor"])
def test_fp8(block: tuple[int, int] | None, tmp_path: Path) -> None:
    """DeepSeek's attention expands latents by a quantized matrix; its experts lie one by one."""
    settings = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}
    quantized, plain = write(tmp_path, "deepseek_v3", settings, fp8(block, "scale_inv"))
    store = kept(quantized)
    check(store, plain, "fp8")
    if block == (32, 32):
        packed, values = (load_file(p / "model.safetensors") for p in (quantized, plain))
        name = "model.layers.1.mlp.experts.3.down_proj.weight"
        theirs = Fp8Dequantize(None)._dequantize_one(packed[name], packed[f"{name}_scale_inv"])
        torch.testing.assert_close(theirs, values[name])


@pytest.mark.parametrize("block", [(32, 32), None], ids=["blocks", "tensor"])
def test_fp8_over_scales(block: tuple[int, int] | None, tmp_path: Path) -> None:
    """GPTQModel's scales are what codes are divided by."""
    settings = {
        "quant_method": "fp8",
        "weight_block_size": block,
        "weight_scale_semantics": "inverse",
    }
    quantized, plain = write(tmp_path, "llama", settings, fp8(block, "scale_inv", divides=True))
    check(kept(quantized), plain, "fp8")


def test_static_scales_of_activations_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"quant_method": "fp8", "activation_scheme": "static"}
    quantized, plain = write(tmp_path, "llama", settings, fp8(None, "scale", static=True))
    check(kept(quantized), plain, "fp8")
    assert "left out 21 scales of activations" in caplog.text


def test_fbgemm_fp8(tmp_path: Path) -> None:
    settings = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    quantize = compressed_tensors("float-quantized", 8, None, True)
    quantized, plain = write(tmp_path, "llama", settings, quantize)
    store = kept(quantized)
    check(store, plain, "fp8")
    spec = store.layers[0].weights["model.layers.0.mlp.up_proj.weight"]
    assert (spec.fp8_rows, spec.block_rows) == (True, 1)


def test_mxfp4(tmp_path: Path) -> None:
    """Stacks of experts, as gpt-oss has them."""
    quantized, plain = write_gpt_oss(tmp_path)
    check(kept(quantized), plain, "mxfp4")


def test_mxfp4_of_model_optimizer(tmp_path: Path) -> None:
    settings = {"quant_method": "modelopt", "quant_algo": "MXFP4"}
    quantized, plain = write(tmp_path, "llama", settings, fp4("modelopt", 32))
    check(kept(quantized), plain, "mxfp4")


@pytest.mark.parametrize("beside", [False, True])
def test_nvfp4_of_model_optimizer(beside: bool, tmp_path: Path) -> None:
    """Said in config.json, or, by older releases, in a file beside it."""
    settings = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}
    made = write(tmp_path, "mixtral", {"quant_method": "modelopt"} | settings, fp4("modelopt", 16))
    quantized, plain = made
    if beside:
        config = json.loads((plain / "config.json").read_text())
        (quantized / "config.json").write_text(json.dumps(config))
        said = {"producer": {"name": "modelopt"}, "quantization": settings}
        (quantized / "hf_quant_config.json").write_text(json.dumps(said))
    check(kept(quantized), plain, "nvfp4")


@pytest.mark.parametrize(("fmt", "group"), [("nvfp4", 16), ("mxfp4", 32)])
def test_four_bit_floats_of_compressed_tensors(fmt: str, group: int, tmp_path: Path) -> None:
    settings = compressed_tensors_settings(f"{fmt}-pack-quantized")
    quantized, plain = write(tmp_path, "mixtral", settings, fp4("compressed-tensors", group))
    check(kept(quantized), plain, fmt)


def test_fp8_of_model_optimizer(tmp_path: Path) -> None:
    settings = {"quant_method": "modelopt", "quant_algo": "FP8"}
    quantize = fp8(None, "scale")

    def with_inputs(weight: Tensor) -> Quantized:
        parts, values = quantize(weight)
        return parts | {"input_scale": torch.ones(())}, values

    quantized, plain = write(tmp_path, "llama", settings, with_inputs)
    store = kept(quantized)
    check(store, plain, "fp8")
    assert store.layers[0].weights["model.layers.0.mlp.up_proj.weight"].fp8_rows


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pre_quant_scale", "inputs are changed before the product"),
        (None, "U8 with scales in F8_E4M3: .* NVFP4_AWQ is not read here"),
    ],
)
def test_what_model_optimizer_adds_is_refused(name: str | None, said: str, tmp_path: Path) -> None:
    quantize = fp4("modelopt", 16)

    def changed(weight: Tensor) -> Quantized:
        parts, values = quantize(weight)
        if name is None:
            del parts["weight_scale_2"]
            return parts, values
        return parts | {name: torch.ones(weight.shape[1])}, values

    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}
    quantized, _ = write(tmp_path, "llama", settings, changed)
    with pytest.raises(StoreError, match=said):
        kept(quantized)


def test_quantizing_again_is_asked_for_and_reported(tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    quantized, plain = write(tmp_path, "mixtral", settings, fp8((32, 32), "scale_inv"))
    with pytest.raises(StoreError, match=r"quantized to fp8; .* the format keep.* --requantize"):
        convert(quantized, tmp_path / "store", format="nf4", allow_missing_tokenizer=True)
    console = Console(record=True, width=140)
    store = run_convert(
        console, quantized, tmp_path / "store", format="nf4", policy=[], double_quant=False,
        requantize=True, allow_missing_tokenizer=True, self_check=None,
    )  # fmt: skip
    assert store.format == "nf4" and store.config["quantization_config"]["load_in_4bit"]
    changes = json.loads((store.path / "headrace-changes.json").read_text())["requantized"]
    assert len(changes) == 3 * (4 + 4 * 3)
    values = load_file(plain / "model.safetensors")
    stored = {n: w for block in store.blocks for n, w in stored_weights(store, block).items()}
    for name, change in changes.items():
        error = float((stored[name] - values[name]).norm() / values[name].norm())
        assert change["from"] == "fp8" and change["to"] == "nf4" and 0.02 < error < 0.2
        assert abs(change["relative_rms"] - error) < 1e-5
    text = console.export_text()
    worst = max(changes, key=lambda name: changes[name]["relative_rms"])
    assert f"quantized again: {len(changes)} weights" in text and worst in text


def test_a_resumed_conversion_reports_all_that_it_changed(tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    quantized, _ = write(tmp_path, "llama", settings, fp8((32, 32), "scale_inv"))

    def stop(progress: Progress) -> None:
        if progress.block == "layer-00002":
            raise InterruptedError

    def run(dest: Path, progress: Callable[[Progress], None] | None = None) -> bytes:
        store = convert(
            quantized, dest, format="int4", requantize=True, allow_missing_tokenizer=True,
            progress=progress,
        )  # fmt: skip
        return (store.path / "headrace-changes.json").read_bytes()

    with pytest.raises(InterruptedError):
        run(tmp_path / "resumed", stop)
    assert run(tmp_path / "resumed") == run(tmp_path / "whole")


def test_there_must_be_something_to_quantize_again(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "src")
    with pytest.raises(StoreError, match="is not quantized: leave out --requantize"):
        convert(tmp_path / "src", tmp_path / "store", requantize=True, allow_missing_tokenizer=True)


@pytest.mark.parametrize("fmt", ["bf16", "int4", "int8"])
def test_any_format_becomes_any_other(fmt: str, tmp_path: Path) -> None:
    settings = GPTQ | {"desc_act": True, "checkpoint_format": "gptq_v2", "bits": 8}
    quantized, plain = write(tmp_path, "llama", settings, gptq(8, less=0, act_order=True))
    store = convert(
        quantized, tmp_path / "store", format=fmt, requantize=True, allow_missing_tokenizer=True
    )
    values = load_file(plain / "model.safetensors")
    stored = {n: w for block in store.blocks for n, w in stored_weights(store, block).items()}
    error = {"bf16": 0.01, "int4": 0.2, "int8": 0.02}[fmt]
    for name in values:
        assert float((stored[name] - values[name]).norm() / values[name].norm()) < error, name
    if fmt == "bf16":
        assert store.format == "bf16" and "quantization_config" not in store.config


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (GPTQ | {"checkpoint_format": "marlin"}, "GPTQ's layout 'marlin' is not read here"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ's layout 'gemv' with 4 bits"),
        (
            {"quant_method": "compressed-tensors", "format": "mxfp8-quantized"},
            "format 'mxfp8-quantized' is not read here",
        ),
        (
            {
                "quant_method": "compressed-tensors", "format": "pack-quantized",
                "transform_config": {"config_groups": {"u": {}}},
            },
            r"rotated \(transform_config\)",
        ),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:fake"},
            "AutoRound's format 'auto_round:fake' is not read here",
        ),
        (
            {"quant_method": "auto-round", "rotation_config": {"block_size": 32}},
            r"rotated \(AutoRound's rotation_config\)",
        ),
        ({"quant_method": "hqq"}, "'hqq', which cannot be converted.* gptq, awq"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    quantized, _ = write(tmp_path, "llama", settings, gptq(4, less=1, act_order=False))
    with pytest.raises(StoreError, match=said):
        kept(quantized)


@pytest.mark.parametrize(
    ("layout", "bits", "less"),
    [("auto_gptq", 4, 1), ("gptqmodel", 4, 0), ("auto_gptq", 8, 1), ("auto_awq", 4, 0)],
)
def test_auto_round(layout: str, bits: int, less: int, tmp_path: Path) -> None:
    """Layouts of others, without g_idx; bits of single layers are in the shapes."""
    quantize = awq if layout == "auto_awq" else gptq(bits, less=less, act_order=False)

    def without_index(weight: Tensor) -> Quantized:
        parts, values = quantize(weight)
        parts.pop("g_idx", None)
        return parts, values

    settings = {"quant_method": "auto-round", "bits": 4, "packing_format": f"auto_round:{layout}"}
    quantized, plain = write(tmp_path, "llama", settings, without_index)
    check(kept(quantized), plain, "int4" if bits == 4 else "int8g")


def test_codes_of_three_bits_are_refused(tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, "llama", GPTQ, gptq(4, less=1, act_order=False))
    file = quantized / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.qweight"
    tensors[name] = tensors[name][:9].contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(StoreError, match="down_proj has GPTQ codes of 3 bits, and only 4 and 8"):
        kept(quantized)
