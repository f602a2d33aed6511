"""Tiny models as GGUF files, written as llama.cpp's convert_hf_to_gguf.py does, and with the values that they hold."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
ARCHITECTURES = {
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "mistral": "llama",
    "mixtral": "llama",
}


def write(
    model: Any,
    path: Path,
    kind: str,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    name: str | None = None,
    pre: str = "default",
    split: int = 0,
    fuse: bool = False,
) -> None:
    """The model as a GGUF file whose matrices are of that kind, or as parts of `split` tensors each. Its parameters
    become what the file holds."""
    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    if name is not None:
        writer.add_name(name)
    for entry, key in KEYS.items():
        value = getattr(config, entry, None)
        if value is not None:
            writer.add_uint32(f"{arch}.{key}", value)
    if arch == "starcoder2":
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if arch in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    for entry in ("attn_logit_softcapping", "final_logit_softcapping"):
        if arch.startswith("gemma") and getattr(config, entry):
            writer.add_float32(f"{arch}.{entry}", getattr(config, entry))
    head = getattr(config, "head_dim", None)
    if head and arch != "phi3":
        writer.add_key_length(head)
    _add_rope(writer, config, head or config.hidden_size // config.num_attention_heads)
    if tokenizer is not None:
        _add_tokenizer(writer, config, tokenizer, pre)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[arch], config.num_hidden_layers)
    tensors = {
        there: (values, put)
        for name, parameter in model.named_parameters()
        for there, values, put in _tensors(name, parameter, names, config)
    }
    if fuse:
        tensors = _fused(tensors)
    for there, (values, put) in tensors.items():
        put(_add(writer, there, values, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_rope(writer: gguf.GGUFWriter, config: Any, head: int) -> None:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    kind = rope["rope_type"]
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if writer.arch in ("llama", "phi3"):
        writer.add_rope_dimension_count(int(head * (rope.get("partial_rotary_factor") or 1)))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("longrope", "yarn"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for each in ("long", "short") if kind == "longrope" else ():
        factors = np.array(rope[f"{each}_factor"], np.float32)
        writer.add_tensor(f"rope_factors_{each}.weight", factors)


def _tensors(name: str, parameter: nn.Parameter, names: Any, config: Any) -> Any:
    """(GGUF name, values there, how values go back into the parameter)."""
    stem, _, suffix = name.rpartition(".")
    data = parameter.data
    fused = re.fullmatch(r"(.*\.experts)\.gate_up_proj", name)
    if fused:
        half = data.shape[1] // 2
        for i, each in enumerate(("gate_proj", "up_proj")):
            part = data[:, i * half : (i + 1) * half]
            yield f"{names.get_name(f'{fused[1]}.{each}')}.weight", part, part.copy_
        return
    if ".experts." in name:
        yield f"{names.get_name(name)}.weight", data, data.copy_
        return
    there = f"{names.get_name(stem)}.{suffix}"
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    if arch == "llama" and re.search(r"\.[qk]_proj\.", name):
        heads = config.num_attention_heads if ".q_" in name else config.num_key_value_heads

        def put(values: Tensor) -> None:
            rows = values.view(heads, len(values) // heads // 2, 2, -1).swapaxes(1, 2)
            data.copy_(rows.reshape(data.shape))

        rows = data.view(heads, 2, len(data) // heads // 2, -1).swapaxes(1, 2)
        yield there, rows.reshape(data.shape), put
    elif config.model_type.startswith("gemma") and "norm" in name:
        yield there, data + 1, lambda values: data.copy_(values - 1)
    else:
        yield there, data, data.copy_


def _fused(tensors: dict[str, Any]) -> dict[str, Any]:
    """Queries, keys and values as one tensor."""
    found: dict[str, Any] = {}
    for name, one in tensors.items():
        joint = re.sub(r"attn_[qkv]\.", "attn_qkv.", name)
        found[joint] = _joined(found[joint], one) if joint in found else one
    return found


def _joined(one: Any, other: Any) -> Any:
    sizes = [len(values) for values, _ in (one, other)]

    def put(values: Tensor) -> None:
        for part, (_, put_one) in zip(values.split(sizes), (one, other), strict=True):
            put_one(part)

    return torch.cat((one[0], other[0])), put


def _add(writer: gguf.GGUFWriter, name: str, values: Tensor, kind: str) -> Tensor:
    if values.dim() < 2 or "ffn_gate_inp" in name:
        kind = "F32"
    elif kind == "MXFP4" and "blk." not in name:
        kind = "Q8_0"  # as llama-quantize has it
    number = gguf.GGMLQuantizationType[kind]
    if kind in UNWRITTEN:
        data = _random(values, number)
    else:
        data = gguf.quantize(values.float().numpy(), number)
    writer.add_tensor(name, data, raw_dtype=number)
    return torch.from_numpy(gguf.dequantize(data, number).reshape(values.shape).copy())


UNWRITTEN = {
    "Q2_K": (80, 2, 2e-4),
    "Q3_K": (108, 1, 2e-4),
    "Q4_K": (0, 2, 2e-4),
    "Q5_K": (0, 2, 2e-4),
    "Q6_K": (208, 1, 2e-5),
    "IQ4_XS": (0, 1, 1e-5),
    "IQ4_NL": (0, 1, 2e-4),
}
"""Kinds that the package cannot write: where the float16 scales are, how many, and the least of random ones."""


def _random(values: Tensor, number: gguf.GGMLQuantizationType) -> Any:
    """Blocks that nobody computed."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[number]
    first, count, least = UNWRITTEN[number.name]
    rng = np.random.default_rng(values.numel())
    shape = (*values.shape[:-1], values.shape[-1] // elements, nbytes)
    data = rng.integers(0, 256, shape, dtype=np.uint8)
    scales = (rng.random((*shape[:-1], count)) * least + least).astype(np.float16).view(np.uint8)
    data[..., first : first + 2 * count] = scales
    return data.reshape(*values.shape[:-1], -1)


def _add_tokenizer(writer: gguf.GGUFWriter, config: Any, tokenizer: Any, pre: str) -> None:
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
