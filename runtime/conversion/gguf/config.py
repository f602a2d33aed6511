"""A GGUF file's metadata as a config.json: what transformers reads of it, and what it leaves out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from headrace.runtime.conversion.gguf.metadata import Metadata, shortest
from headrace.scheduler.errors import StoreError

KEYS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
"""Set where the model's configuration has such an entry, and the file the key."""

QUERIES = ("attn_q", "attn_qkv")
BIASES = {
    "attention_bias": QUERIES,
    "qkv_bias": QUERIES,
    "use_bias": QUERIES,
    "mlp_bias": ("ffn_gate",),
}
"""Entries that are true where one of these has a bias."""

TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
"""None where the file has none, whatever a model of this kind has by default."""

YARN = {
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
EMBEDDING = "token_embd.weight"
ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
"""Tensors that belong to the configuration."""

DEFAULT_THETA = 10000.0
"""llama.cpp's, for files that do not say."""

LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}
"""Models whose attention is scaled by another width than a head's. Files do not say so: llama.cpp counts layers."""


def read_config(
    file: Path, metadata: Metadata, tensors: Mapping[str, gguf.ReaderTensor]
) -> PretrainedConfig:
    """StoreError for a model that transformers cannot tell from metadata, or with rotations that are not known."""
    if EMBEDDING not in tensors:
        raise StoreError(
            f"{file} has no {EMBEDDING}: it is no language model, but part of one or something beside it"
        )
    found = _by_transformers(file)
    known = found
    if metadata.arch == "llama":  # whatever transformers makes of its name
        known = AutoConfig.for_model("mixtral" if metadata.get("expert_count") else "llama")
    model_type = known.model_type
    values = {
        name: value
        for name, value in found.to_dict().items()
        if hasattr(known, name) and name not in ("model_type", "rope_parameters")
    }
    values["vocab_size"] = int(tensors[EMBEDDING].shape[1])
    values["tie_word_embeddings"] = "output.weight" not in tensors
    values |= {
        name: metadata.get(key)
        for key, name in KEYS.items()
        if hasattr(known, name) and metadata.get(key) is not None
    }
    values |= {n: metadata.whole(f"tokenizer.ggml.{key}_token_id") for n, key in TOKENS.items()}
    values |= {
        name: any(f"blk.0.{each}.bias" in tensors for each in places)
        for name, places in BIASES.items()
        if hasattr(known, name)
    }
    if model_type.startswith("gemma"):
        values |= _gemma(model_type, metadata, values)
    elif hasattr(known, "sliding_window"):
        # 0 and nothing are none, whatever models of this kind have by default.
        values["sliding_window"] = metadata.get("attention.sliding_window") or None
    rope = _rope(metadata, tensors, values)
    return AutoConfig.for_model(model_type, **shortest(values), rope_parameters=shortest(rope))


def _by_transformers(file: Path) -> PretrainedConfig:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:  # whatever its readers of single models raise
        raise StoreError(
            f"{file}: transformers cannot read what model this is: {error}. Convert the original"
            " checkpoint"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def _gemma(model_type: str, metadata: Metadata, values: dict[str, Any]) -> dict[str, Any]:
    layers = values["num_hidden_layers"]
    is_27b = layers == LAYERS_OF_27B.get(model_type)
    by_width = values["hidden_size"] // values["num_attention_heads"]
    found = {"query_pre_attn_scalar": by_width if is_27b else values["head_dim"]}
    if model_type == "gemma3_text" and metadata.get("attention.sliding_window") is None:
        found["layer_types"] = ["full_attention"] * layers
    return found


def _rope(
    metadata: Metadata, tensors: Mapping[str, gguf.ReaderTensor], values: dict[str, Any]
) -> dict[str, Any]:
    theta = metadata.get("rope.freq_base", DEFAULT_THETA)
    head = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": theta} | _scaling(metadata, tensors, theta, head)
    rotated = metadata.get("rope.dimension_count", head)
    if rotated != head:
        rope["partial_rotary_factor"] = rotated / head
    if metadata.arch != "gemma3":
        return rope
    local = {
        "rope_type": "default",
        "rope_theta": metadata.get("rope.freq_base_swa", DEFAULT_THETA),
    }
    return {"full_attention": rope, "sliding_attention": local}


def _scaling(
    metadata: Metadata, tensors: Mapping[str, gguf.ReaderTensor], theta: float, head: int
) -> dict[str, Any]:
    if ROPE_FREQS in tensors:
        return llama3_scaling(_factors(tensors[ROPE_FREQS]), theta, head)
    original = metadata.get("rope.scaling.original_context_length")
    if ROPE_LONG in tensors:
        return {
            "rope_type": "longrope",
            "original_max_position_embeddings": original,
            "long_factor": _factors(tensors[ROPE_LONG]).tolist(),
            "short_factor": _factors(tensors[ROPE_SHORT]).tolist(),
        }
    factor = metadata.get("rope.scaling.factor", 0.0)
    kind = metadata.get("rope.scaling.type", "linear" if factor else "none")
    if kind == "none" or not factor:
        return {}
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    if kind != "yarn":
        raise StoreError(
            f"the file scales rotary embeddings by {kind}, which is not read here: convert the original checkpoint"
        )
    found = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    more = {name: metadata.get(f"rope.scaling.{key}") for key, name in YARN.items()}
    return found | {name: value for name, value in more.items() if value is not None}


def _factors(tensor: gguf.ReaderTensor) -> Tensor:
    return torch.from_numpy(tensor.data.copy()).float()


def llama3_scaling(factors: Tensor, theta: float, head: int) -> dict[str, Any]:
    """Llama 3's scaling whose factors [head / 2] a file holds as a tensor, and not in its metadata.

    StoreError where they are of no Llama 3 that was published.
    """
    frequencies = theta ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
    wavelengths = 2 * torch.pi / frequencies
    for factor in (8.0, 32.0):
        low, high, before = 1.0, 4.0, 8192
        smooth = (before / wavelengths - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        want = torch.where(wavelengths < before / high, torch.ones(()), between)
        want = torch.where(wavelengths > before / low, torch.full((), factor), want)
        if torch.allclose(want, factors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": before,
            }
    raise StoreError(
        "the file scales rotary embeddings (rope_freqs.weight) in no way that a Llama 3 does, and does not say"
        " how: convert the original checkpoint"
    )
