"""Files of llama.cpp itself as stores: how far their logits are from llama.cpp's own.

    python benchmarks/llama_cpp.py SOURCES BUILD [--models Llama "Gemma 2"] [--types F32 Q4_K_M]

SOURCES are llama.cpp's, BUILD is what CMake made of them with shared libraries (llama-quantize and libllama). The
bundled model and tiny random ones of each architecture go through convert_hf_to_gguf.py and llama-quantize, then
through `headrace convert --format keep`. Both sides compute in float32: llama.cpp rounds what it multiplies with
quantized matrices, so its logits are those of a file that it made of the same values (llama-quantize F32). Each
number is the largest difference of logits relative to the largest logit; or it is which type was refused. In
brackets is of how many tokens it is, where a later one differs by more than 1 %: in mixtures rounding decides where
a router likes two experts as much, and tokens behind attend to that one.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from perplexity import EXAMPLES, Ours
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.runtime.conversion.convert import convert
from headrace.scheduler.errors import StoreError

BUNDLED = EXAMPLES / "stories-9m"
TOKENS = torch.randint(4, 4096, (100,), generator=torch.Generator().manual_seed(5)).tolist()
TYPES = """F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 IQ4_NL IQ4_XS MXFP4_MOE Q2_K Q3_K_M Q4_K_S Q4_K_M Q5_K_M
Q6_K"""
APART = 0.01
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 3,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1 + i / 64 for i in range(32)],
    "long_factor": [1 + i / 4 for i in range(32)],
    "original_max_position_embeddings": 512,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
GEMMA = {"head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 8}
TIED = {"tie_word_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {"rope_parameters": {"rope_theta": 5e5}}),
    "Llama, tied, biases": ("llama", TIED | {"attention_bias": True}),
    "Llama 3": ("llama", {"rope_parameters": {"rope_theta": 5e5} | LLAMA3}),
    "Llama, YaRN": ("llama", {"rope_parameters": {"rope_theta": 1e4} | YARN}),
    "Mistral": ("mistral", {"sliding_window": None, "rope_parameters": {"rope_theta": 1e6}}),
    "Mixtral": ("mixtral", {"num_local_experts": 4}),
    "Qwen 2": ("qwen2", {"rope_parameters": {"rope_theta": 1e6}}),
    "Qwen 2, YaRN": ("qwen2", {"rope_parameters": {"rope_theta": 1e6} | YARN}),
    "Qwen 2 MoE": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 512}),
    "Qwen 3": ("qwen3", {"head_dim": 128}),
    "Qwen 3 MoE": ("qwen3_moe", EXPERTS | {"head_dim": 128, "norm_topk_prob": True}),
    "Gemma 2": ("gemma2", GEMMA),
    "Gemma 3": ("gemma3_text", GEMMA | {"num_hidden_layers": 7}),
    "Gemma 3, linear": (
        "gemma3_text",
        GEMMA
        | {
            "num_hidden_layers": 7,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL},
        },
    ),
    "Phi 3": ("phi3", {"sliding_window": None}),
    "Phi 3, long": ("phi3", {"rope_parameters": {"rope_theta": 1e4} | LONG}),
    "Phi 4 mini": ("phi3", TIED | {"partial_rotary_factor": 0.75}),
    "StarCoder 2": ("starcoder2", TIED | {"rope_parameters": {"rope_theta": 1e6}}),
}
CONVERTER = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
# It knows published tokenizers alone: the bundled one splits as this one does, and there is no tokenizer.model.
TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
TextModel._set_vocab_sentencepiece = TextModel._set_vocab_gpt2
script = sys.argv.pop(1) + "/convert_hf_to_gguf.py"
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


def save_model(name: str, path: Path) -> None:
    """A random one, with the bundled model's tokenizer."""
    model_type, changes = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | changes))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            if "norm" in each:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.normal_(0.0, 0.05)
    model.save_pretrained(path)
    shutil.copy(BUNDLED / "tokenizer.json", path)
    settings = json.loads((BUNDLED / "tokenizer_config.json").read_text())
    if model_type == "phi3":
        settings["tokenizer_class"] = "GPT2Tokenizer"  # as Phi 4 has it: no SentencePiece
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


class LlamaCpp:
    """Programs of a build."""

    def __init__(self, sources: Path, build: Path, folder: Path) -> None:
        self._sources, self._quantize = sources, build / "bin" / "llama-quantize"
        self._logits = folder / "logits"
        includes = [f"-I{sources / each / 'include'}" for each in ("", "ggml")]
        source = Path(__file__).with_name("llama_cpp_logits.cpp")
        libraries = [f"-L{build / 'bin'}", f"-Wl,-rpath,{build / 'bin'}", "-lllama", "-lggml-base"]
        _run("g++", "-std=c++17", *includes, source, *libraries, "-o", self._logits)

    def convert(self, model: Path, file: Path) -> None:
        script = [sys.executable, "-c", CONVERTER, self._sources, model]
        # Files of a model that is called Phi 3 are expected to have Phi 3's special tokens.
        _run(*script, "--outtype", "f32", "--outfile", file, "--model-name", "tiny")

    def quantize(self, source: Path, file: Path, kind: str) -> None:
        _run(self._quantize, "--allow-requantize", source, file, kind, 2)

    def logits(self, file: Path) -> Tensor:
        out = file.with_suffix(".logits")
        _run(self._logits, file, out, *TOKENS)
        return torch.from_numpy(np.fromfile(out, np.float32)).view(len(TOKENS), -1)


def _run(*command: object) -> None:
    words = [str(each) for each in command]
    ran = subprocess.run(words, check=False, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{command[0]} failed:\n{ran.stderr[-2000:]}")


@torch.inference_mode()
def difference(llama_cpp: LlamaCpp, source: Path, kind: str) -> str:
    folder = source.parent
    file, same, store = folder / f"{kind}.gguf", folder / "same.gguf", folder / kind
    llama_cpp.quantize(source, file, kind)
    llama_cpp.quantize(file, same, "F32")
    try:
        convert(file, store, format="keep")
    except StoreError as error:
        refused = re.search(r" is (\w+), which is not read here", str(error))
        if refused is None:
            raise
        return f"{refused[1]} refused"
    want = llama_cpp.logits(same)
    found = torch.cat(list(Ours(store)(TOKENS)))
    each = (found - want).abs().amax(1) / want.abs().max()
    apart = (each > APART).nonzero()
    count = int(apart[0]) if len(apart) else len(TOKENS)
    return f"{float(each[: count or None].max()):.1e}" + (f" ({count})" if len(apart) else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("sources", type=Path)
    parser.add_argument("build", type=Path)
    parser.add_argument("--models", nargs="+", choices=("bundled", *MODELS), metavar="MODEL")
    parser.add_argument("--types", nargs="+", default=TYPES.split(), metavar="TYPE")
    arguments = parser.parse_args()
    table = Table("model", *arguments.types)
    with tempfile.TemporaryDirectory() as folder:
        llama_cpp = LlamaCpp(arguments.sources.absolute(), arguments.build.absolute(), Path(folder))
        for name in arguments.models or ("bundled", *MODELS):
            here = Path(folder) / name
            here.mkdir()
            if name != "bundled":
                save_model(name, here / "model")
            model = BUNDLED if name == "bundled" else here / "model"
            llama_cpp.convert(model, here / "source.gguf")
            row = [difference(llama_cpp, here / "source.gguf", kind) for kind in arguments.types]
            print(name, *row, flush=True)
            table.add_row(name, *row)
            shutil.rmtree(here)
    Console(width=220).print(table)


if __name__ == "__main__":
    main()
