"""Tiny models of the architectures that are known to run, and configurations that must not."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 16}
_WINDOW = {"sliding_window": 8}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MLA = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}

SUPPORTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _WINDOW,
    "ministral3": _HEAD,
    "qwen2": {},
    "qwen3": _HEAD,
    "mixtral": _LOCAL,
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
    "qwen3_moe": _HEAD | _EXPERTS | {"decoder_sparse_step": 1},
    "gpt_oss": _HEAD | _LOCAL | _WINDOW,
    "deepseek_v2": _MLA | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": _MLA,
    "gemma": _HEAD,
    "gemma2": _HEAD | _WINDOW,
    "gemma3_text": _HEAD | _WINDOW | {"num_hidden_layers": 7},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "olmo3": _WINDOW | {"num_hidden_layers": 4},
    "olmoe": _EXPERTS,
    "glm": _HEAD,
    "glm4": _HEAD,
    "glm4_moe": _HEAD
    | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "cohere": {},
    "cohere2": _HEAD | _WINDOW | {"num_hidden_layers": 4},
    "starcoder2": {"sliding_window": 8},
    "stablelm": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "granitemoe": _LOCAL | {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "gpt_neox": {},
    "smollm3": {},
    "ernie4_5": _HEAD,
    "hunyuan_v1_dense": _HEAD,
    "exaone4": _WINDOW,
    "nemotron": {},
    "minimax_m2": _HEAD | _LOCAL,
    "seed_oss": _HEAD,
    "apertus": {},
    "arcee": {},
}

REFUSED: dict[str, dict[str, Any]] = {
    "phimoe": _LOCAL | _WINDOW,
    "llama4_text": _HEAD
    | {"num_local_experts": 4, "intermediate_size_mlp": 96, "attention_chunk_size": 16},
    "qwen3_next": _HEAD
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
}


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """A tiny configuration of a SUPPORTED or REFUSED model type."""
    settings = SUPPORTED.get(model_type) or REFUSED.get(model_type) or {}
    return AutoConfig.for_model(model_type, **(_BASE | settings | changes))


def tiny_model(model_type: str, **changes: Any) -> Any:
    """A random float32 model whose logits are far from uniform: greedy decoding is well defined."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **changes)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    model.generation_config.eos_token_id = None
    return model.eval()


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """transformers' greedy continuation of one prompt alone."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    continuation: list[int] = output[0, len(prompt) :].tolist()
    return continuation
