"""Tensors of a GGUF file by the names of the Hugging Face checkpoint that they were made from."""

import re
from collections.abc import Iterator

import gguf
from torch import Tensor, nn
from transformers import PretrainedConfig

from headrace.scheduler.errors import StoreError

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "mixtral": "llama",
    "phi3": "phi3",
    "starcoder2": "starcoder2",
}
"""What llama.cpp calls the architecture of a model_type. Others have tensors that it changed in ways of their own."""

PLUS_ONE = ("gemma2", "gemma3_text")
"""Models whose norms multiply by one more than their weight; GGUF holds the sum."""

MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""What checkpoints of Mixtral call the matrices of experts."""

_FUSED = re.compile(r"(.*\.experts)\.gate_up_proj")


def names_of(config: PretrainedConfig, model: nn.Module) -> dict[str, str]:
    """By GGUF's names; those of experts, which are a stack there, have a {} for the expert. StoreError for an architecture that is not read here."""
    arch = ARCHITECTURES.get(config.model_type)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in numbers:
        raise StoreError(
            f"GGUF files of {config.model_type} are not read here, only those of"
            f" {', '.join(sorted(ARCHITECTURES))}: convert the original checkpoint"
        )
    known = gguf.get_tensor_name_map(numbers[arch], config.num_hidden_layers)
    found = {}
    for name in _parameters(model):
        stem, dot, suffix = name.rpartition(".")
        stem, suffix = (stem, dot + suffix) if suffix in ("weight", "bias") else (name, "")
        there = known.get_name(stem)
        if there is None:
            continue
        if ".experts." in name:
            suffix = ".weight"
            experts, _, matrix = stem.rpartition(".")
            if config.model_type == "mixtral":
                experts, matrix = experts.replace(".mlp.", ".block_sparse_moe."), MIXTRAL[matrix]
            name = f"{experts}.{{}}.{matrix}.weight"
        found[there + suffix] = name
    return found


def _parameters(model: nn.Module) -> Iterator[str]:
    """A stack of experts' gates and ups is two, as it is on disk."""
    for name, _ in model.named_parameters(remove_duplicate=False):
        fused = _FUSED.fullmatch(name)
        if fused is not None:
            yield from (f"{fused[1]}.{each}_proj" for each in ("gate", "up"))
        else:
            yield name


def parts_of_fused(name: str, config: PretrainedConfig) -> dict[str, int]:
    """Queries, keys and values, which llama.cpp can join (--fuse-qkv), with their rows; none for another tensor."""
    block, _, rest = name.rpartition(".attn_qkv.")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = {"q": config.num_attention_heads} | dict.fromkeys("kv", config.num_key_value_heads)
    return {f"{block}.attn_{e}.{rest}": n * head for e, n in heads.items()} if block else {}


def as_trained(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys of llama: a head's halves are interleaved there. `rows` [heads * 2 n, ...].

    From convert_hf_to_gguf.py's LlamaModel.permute, the other way round.
    """
    half = len(rows) // heads // 2
    return rows.view(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def heads_of(name: str, config: PretrainedConfig) -> int:
    """How many heads have their rows interleaved in the tensor of this GGUF name; 0 for none."""
    if ARCHITECTURES[config.model_type] != "llama":
        return 0
    if re.search(r"\.attn_q\.", name):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if re.search(r"\.attn_k\.", name) else 0
