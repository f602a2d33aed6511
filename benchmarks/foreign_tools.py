"""Checkpoints that other tools write, and what stores of them compute: nothing is packed or unpacked by us.

    GPTQMODEL_CPU_WORKERS=2 python benchmarks/foreign_tools.py [gptqmodel] [llmcompressor] [autoawq] [auto-round] [nvidia-modelopt]

Each tool quantizes the bundled model, `headrace convert --format keep` takes what it wrote, and the store's logits and
weights are compared in float32 with those of transformers with weights that a tool dequantized (foreign_weights.py):
AutoAWQ does all of AWQ, compressed-tensors all of its layouts, GPTQModel, AutoRound and Model Optimizer what they wrote.
Some rows of the model are made non-negative, for zero points of 0. The tools are no dependencies of Headrace:
install those that are named (without arguments, all), AutoAWQ and compressed-tensors with them.
"""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from foreign_weights import Options, dequantized, plain_config
from perplexity import EXAMPLES, TEXTS, Ours
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.runtime.conversion.convert import convert
from headrace.runtime.conversion.quantize import TORCH_DTYPES, decode
from headrace.runtime.store import Store

TOKENS = 200
"""That are predicted."""

SAMPLES = 16
"""Texts to calibrate with."""

Writer = Callable[[Path, Path, list[str], Options], None]


def gptqmodel(source: Path, out: Path, texts: list[str], options: Options) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(source), QuantizeConfig(**options))
    model.quantize(texts, batch_size=8)
    model.save(str(out))


def llmcompressor(source: Path, out: Path, texts: list[str], options: Options) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    modifier = GPTQModifier if "actorder" in options else QuantizationModifier
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(source),
        recipe=modifier(**{"ignore": ["lm_head"]} | options),
        dataset=Dataset.from_dict({"text": texts}),
        max_seq_length=256,
        num_calibration_samples=len(texts),
    )
    model.save_pretrained(out, save_compressed=True)


def autoawq(source: Path, out: Path, texts: list[str], options: Options) -> None:
    from awq import AutoAWQForCausalLM

    model = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu", safetensors=True)
    given = {"zero_point": True, "w_bit": 4, "version": "GEMM"} | options
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.quantize(tokenizer, quant_config=given, calib_data=texts, max_calib_seq_len=128)
    model.save_quantized(str(out))


def auto_round(source: Path, out: Path, texts: list[str], options: Options) -> None:
    """To nearest: texts are for the scales of activations only."""
    from auto_round import AutoRound

    dataset = out.with_suffix(".json")
    dataset.write_text(json.dumps([{"text": text} for text in texts]))
    given = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu", "dataset": str(dataset)}
    given |= {"nsamples": len(texts), "seqlen": 32} | options
    layout = given.pop("format")
    AutoRound(str(source), **given).quantize_and_save(str(out), format=layout)


def modelopt(source: Path, out: Path, texts: list[str], options: Options) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    settings = getattr(mtq, options["config"])
    model = mtq.quantize(model, settings, lambda model: [model(each) for each in ids])
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=out)


def weights(bits: int, strategy: str, **more: Any) -> Options:
    """llm-compressor's options for what no scheme of it has."""
    given = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": False} | more
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": given}}}


INT4, INT8 = {"bits": 4}, {"bits": 8}
FP8 = {"quant_method": "fp8", "format": "fp8"}
ACT_ORDER = {"desc_act": True, "act_group_aware": False}
CASES: Mapping[str, tuple[Writer, list[Options]]] = {
    "gptqmodel": (
        gptqmodel,
        [
            INT4 | {"group_size": 64, "sym": True},
            INT4 | {"group_size": 32, "sym": False},
            INT4 | {"group_size": 32, "sym": False, "format": "gptq_v2"},
            INT4 | {"group_size": 128, "sym": True} | ACT_ORDER,
            INT4 | {"group_size": 64, "sym": False, "format": "gptq_v2"} | ACT_ORDER,
            INT8 | {"group_size": 128, "sym": True},
            INT8 | {"group_size": 64, "sym": False},
            INT4 | {"group_size": 64, "sym": False, "quant_method": "awq", "format": "gemm"},
            FP8,
            FP8 | {"weight_scale_method": "block", "weight_block_size": [128, 128]},
        ],
    ),
    "llmcompressor": (
        llmcompressor,
        [
            {"scheme": "W4A16"},
            {"scheme": "W4A16_ASYM"},
            {"scheme": "W4A16", "actorder": "static"},
            {"scheme": "W4A16_ASYM", "actorder": "weight"},
            {"scheme": "W8A16"},
            weights(8, "group", group_size=64),
            weights(8, "tensor"),
            {"scheme": "W8A8"},
            {"scheme": "W4A8"},
            {"scheme": "W4AFP8"},
            {"scheme": "FP8"},
            {"scheme": "FP8_DYNAMIC"},
            {"scheme": "FP8_BLOCK"},
            {"scheme": "NVFP4A16"},
            {"scheme": "NVFP4"},
            {"scheme": "MXFP4A16"},
        ],
    ),
    "autoawq": (autoawq, [{"q_group_size": 64}]),
    "auto-round": (
        auto_round,
        [
            INT4 | {"group_size": 64, "sym": True, "format": "auto_gptq"},
            INT4 | {"group_size": 32, "sym": False, "format": "auto_gptq"},
            INT8 | {"group_size": 128, "sym": True, "format": "auto_gptq"},
            INT4 | {"group_size": 64, "sym": False, "format": "auto_awq"},
            INT4 | {"group_size": 128, "sym": True, "format": "auto_awq"},
            INT4 | {"group_size": 64, "sym": True, "format": "auto_round"},
            INT4 | {"group_size": 32, "sym": False, "format": "auto_round"},
            INT8 | {"group_size": 64, "sym": True, "format": "auto_round"},
            {"scheme": "W4A16", "format": "llm_compressor"},
            {"scheme": "INT8_W8A8", "format": "llm_compressor"},
            {"scheme": "FP8_STATIC", "format": "llm_compressor"},
            {"scheme": "FP8_BLOCK", "format": "llm_compressor"},
        ],
    ),
    "nvidia-modelopt": (
        modelopt,
        [
            {"config": "NVFP4_DEFAULT_CFG"},
            {"config": "NVFP4_MLP_ONLY_CFG"},
            {"config": "FP8_DEFAULT_CFG"},
            {"config": "FP8_PER_CHANNEL_PER_TOKEN_CFG"},
            {"config": "MXFP4_DEFAULT_CFG"},
        ],
    ),
}


def stored(store: Store) -> Iterator[tuple[str, Tensor]]:
    """All weights, in float32."""
    for block in store.blocks:
        data = torch.frombuffer(store.read_block(block), dtype=torch.uint8)
        for name, spec in block.weights.items():
            parts = {
                role: data[p.offset : p.offset + p.nbytes].view(TORCH_DTYPES[p.dtype]).view(p.shape)
                for role, p in spec.parts.items()
            }
            yield name, decode(spec, parts, torch.float32)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def compare(checkpoint: Path, dest: Path, tokens: list[int]) -> tuple[str, float, float]:
    """The store's format, and its largest differences of logits and of a weight from a tool's, relative to the largest value."""
    store = convert(checkpoint, dest, format="keep", allow_missing_tokenizer=True)
    settings = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    tensors = load_file(checkpoint / "model.safetensors")
    values = dequantized(checkpoint, tensors, settings)
    model = AutoModelForCausalLM.from_config(plain_config(checkpoint), dtype=torch.float32).eval()
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    reference = model(torch.tensor([tokens])).logits[0]
    logits = torch.cat(list(Ours(dest)(tokens)))
    worst = max(apart(weight, values[name]) for name, weight in stored(store))
    return store.format, apart(logits, reference), worst


def write_source(folder: Path) -> None:
    """The bundled model with rows of no negative value."""
    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "stories-9m", dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[::16].abs_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLES / "stories-9m").save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tools", nargs="*", choices=[*CASES, []], metavar="TOOL")
    chosen = parser.parse_args().tools or list(CASES)
    texts = [text for text in TEXTS["stories"].read_text().split("\n\n") if len(text) > 200]
    table = Table("tool", "options", "store", "logits", "weights")
    # Some tools leave logs where they run.
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        write_source(folder / "source")
        held_out = "\n\n".join(texts[SAMPLES:])
        tokens = AutoTokenizer.from_pretrained(folder / "source")(held_out).input_ids[:TOKENS]
        for tool in chosen:
            write, cases = CASES[tool]
            for i, options in enumerate(cases):
                out = folder / f"{tool}-{i}"
                write(folder / "source", out, texts[:SAMPLES], options)
                checkpoint = next(out.rglob("config.json")).parent
                fmt, logits, worst = compare(checkpoint, folder / f"{tool}-{i}-store", tokens)
                said = json.dumps(options)[1:-1].replace('"', "")
                row = (f"{tool} {version(tool)}", said, fmt, f"{logits:.1e}", f"{worst:.1e}")
                print(*row, flush=True)
                table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
