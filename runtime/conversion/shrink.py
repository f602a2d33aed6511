"""A configuration made small: every kind of layer is kept, widths and counts are not."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig

from headrace.runtime.conversion.layer_facts import signature
from headrace.runtime.skeleton import Skeleton
from headrace.scheduler.errors import UnsupportedModelError

VOCABULARY = 256
_HIDDEN = 64
_HEAD = 16
_ROTATED = 8
_WINDOW = 8
_MAX_LAYERS = 12


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


# By name of the setting. Values that are absent, None or 0 stay as they are.
_SMALLER: Mapping[str, Callable[[int], int]] = {
    "pad_token_id": _at_most(0),
    "bos_token_id": _at_most(1),
    "eos_token_id": lambda _: 2,
    "first_k_dense_replace": _at_most(1),
    "sliding_window": _at_most(_WINDOW),
    "attention_chunk_size": _at_most(_WINDOW),
    "num_experts": _at_most(8),
    "num_local_experts": _at_most(8),
    "n_routed_experts": _at_most(8),
    "moe_num_experts": _at_most(8),
    "num_experts_per_tok": _at_most(2),
    "moe_topk": _at_most(2),
    "moe_k": _at_most(2),
    "num_experts_per_token": _at_most(2),
    "n_group": _at_most(2),
    "num_expert_group": _at_most(2),
    "topk_group": _at_most(1),
    "q_lora_rank": _at_most(32),
    "kv_lora_rank": _at_most(32),
    "qk_rope_head_dim": _at_most(_ROTATED),
    "qk_nope_head_dim": _at_most(16),
    "v_head_dim": _at_most(12),
}


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """A small copy of `config` that keeps its head ratios and has a layer of every kind.

    Raises UnsupportedModelError when the kinds of layers do not fit a dozen of them.
    """
    described = copy.deepcopy(config.to_dict())
    _shrink_heads(described)
    for key, value in list(described.items()):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            described[key] = _smaller(key, value)
        elif key == "eos_token_id" and isinstance(value, list):
            described[key] = 2
    _shrink_rope(described)
    layers: int = described["num_hidden_layers"]
    small = _build(config, described)
    kept = _layers_to_keep(small)
    for key, value in described.items():
        if isinstance(value, list) and len(value) == layers:
            described[key] = value[:kept]
        elif isinstance(value, dict) and value and all(str(k).isdigit() for k in value):
            described[key] = {k: v for k, v in value.items() if int(k) < kept}
    described["num_hidden_layers"] = kept
    return _build(config, described)


def _smaller(key: str, value: int) -> int:
    if key in _SMALLER:
        return _SMALLER[key](value)
    if "vocab_size" in key:
        return VOCABULARY
    return min(value, 48) if "intermediate_size" in key or key == "ffn_hidden_size" else value


def _build(config: PretrainedConfig, described: dict[str, Any]) -> PretrainedConfig:
    for key in ("quantization_config", "dtype", "torch_dtype"):
        described.pop(key, None)
    return type(config).from_dict(described)


def _shrink_heads(described: dict[str, Any]) -> None:
    heads = described.get("num_attention_heads")
    if not isinstance(heads, int):
        raise UnsupportedModelError("config.json has no single num_attention_heads")
    kv_heads = described.get("num_key_value_heads")
    kv = kv_heads if isinstance(kv_heads, int) and kv_heads > 0 else heads
    small_kv = min(kv, 2)
    small = small_kv * min(max(heads // kv, 1), 4)
    head = described.get("head_dim")
    if "qk_rope_head_dim" in described:
        # Latent attention: head_dim, where there is one, is the rotated part.
        described["hidden_size"] = _HIDDEN
        if head is not None:
            described["head_dim"] = min(described["qk_rope_head_dim"], _ROTATED)
    elif head is None or head * heads == described.get("hidden_size"):
        # Heads make up the hidden size, and some models rely on that.
        size = max(_HEAD, _HIDDEN // small // _HEAD * _HEAD)
        described["hidden_size"] = small * size
        if head is not None:
            described["head_dim"] = size
    else:
        described["hidden_size"], described["head_dim"] = _HIDDEN, min(head, _HEAD)
    described["num_attention_heads"] = small
    if isinstance(kv_heads, int):
        described["num_key_value_heads"] = small_kv


def _shrink_rope(described: dict[str, Any]) -> None:
    """LongRoPE has one factor per pair of rotated dimensions; the small heads have fewer pairs."""
    rope = described.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and "short_factor" in parameters:
            hidden, heads = described["hidden_size"], described["num_attention_heads"]
            head = described.get("head_dim") or hidden // heads
            pairs = int(head * parameters.get("partial_rotary_factor", 1.0)) // 2
            for key in ("short_factor", "long_factor"):
                parameters[key] = parameters[key][:pairs]


def _layers_to_keep(config: PretrainedConfig) -> int:
    """How many of the first layers show every kind that there is, and at least two."""
    kinds = [signature(layer) for layer in Skeleton(config, torch.float32).layers]
    seen: set[tuple[object, ...]] = set()
    last = 1
    for i, kind in enumerate(kinds):
        if kind not in seen:
            seen.add(kind)
            last = i
    if last >= _MAX_LAYERS:
        raise UnsupportedModelError(
            f"a kind of decoder layer first appears as layer {last}; at most {_MAX_LAYERS} layers "
            "are tried"
        )
    return min(last + 1, len(kinds))
