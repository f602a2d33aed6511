"""Configurations that benchmarks run: the shapes of well-known models, and tiny ones for a CPU.

Token ids of the tokenizer that comes with them (4096 of them) are valid in all of them.
"""

from typing import Any

_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 3}


def _llama(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **_SPECIAL,
    }


def _qwen3_moe(
    layers: int, hidden: int, moe: int, heads: int, kv_heads: int, experts: int, vocab: int
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "moe_intermediate_size": moe,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128 if hidden >= 1024 else hidden // heads,
        "num_experts": experts,
        "num_experts_per_tok": min(8, experts // 2),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": vocab,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **_SPECIAL,
    }


SHAPES = {
    "llama-70b": _llama(80, 8192, 28672, 64, 8, 128256),
    "llama-1b": _llama(16, 2048, 8192, 32, 8, 128256) | {"tie_word_embeddings": True},
    "llama-8b": _llama(32, 4096, 14336, 32, 8, 128256),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 768, 32, 4, 128, 151936),
    "tiny": _llama(6, 256, 512, 4, 2, 4352),
    "tiny-moe": _qwen3_moe(4, 128, 64, 4, 2, 8, 4096),
}


def config_of(shape: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of a shape, with `layers` instead of all its layers."""
    config = dict(SHAPES[shape])
    if layers is not None:
        config["num_hidden_layers"] = layers
    return config
