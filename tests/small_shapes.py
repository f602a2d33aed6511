"""The shapes of `headrace bench`, narrow enough for a CPU."""

from typing import Any

from headrace.cluster.bench.shapes import SHAPES

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 512,
}
LATENT: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}


def small_config(shape: str) -> dict[str, Any]:
    """The shape with two layers and narrow ones; of DeepSeek's, one is dense and one has experts."""
    small = SMALL | LATENT if shape == "deepseek-v3" else SMALL
    return {**SHAPES[shape], **{key: small[key] for key in small if key in SHAPES[shape]}}
