"""Configurations of well-known models, whose shapes are run with random weights."""

import json
from collections.abc import Iterable
from typing import Any

from headrace.scheduler.errors import HeadraceError

_COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

_LLAMA = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}

_QWEN3_MOE = _COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}

_MIXTRAL = _COMMON | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
}

_DEEPSEEK_V3 = _COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def _of(base: dict[str, Any], layers: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    return base | {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "1b": _of(_LLAMA, 16, 2048, 32, intermediate_size=8192, head_dim=64, tie_word_embeddings=True),
    "8b": _of(_LLAMA, 32, 4096, 32, intermediate_size=14336),
    "70b": _of(_LLAMA, 80, 8192, 64, intermediate_size=28672),
    "405b": _of(_LLAMA, 126, 16384, 128, intermediate_size=53248),
    "qwen3-30b": _of(_QWEN3_MOE, 48, 2048, 32, intermediate_size=6144, moe_intermediate_size=768),
    "qwen3-235b": _of(
        _QWEN3_MOE, 94, 4096, 64, intermediate_size=12288, moe_intermediate_size=1536
    ),
    "mixtral-8x7b": _MIXTRAL,
    "deepseek-v3": _DEEPSEEK_V3,
}
"""config.json by name: Llama 3 (1b is 3.2), Qwen3 MoE, Mixtral, and DeepSeek V3 without the extra
layer that predicts a second token."""


def config_of(
    shape: str, layers: int | None = None, settings: Iterable[str] = ()
) -> dict[str, Any]:
    """config.json of a shape: its first `layers` layers (None: all), and "KEY=VALUE" in `settings`.

    Raises HeadraceError for an unknown shape, more layers than it has, or a setting that it lacks.
    """
    if shape not in SHAPES:
        raise HeadraceError(f"no shape is called {shape!r}; there are {', '.join(SHAPES)}")
    config = dict(SHAPES[shape])
    whole = config["num_hidden_layers"]
    if layers is not None:
        if not 1 <= layers <= whole:
            raise HeadraceError(f"{shape} has {whole} layers: --layers takes 1 to {whole}")
        config["num_hidden_layers"] = layers
    for setting in settings:
        key, found, text = setting.partition("=")
        if not found or key not in config:
            raise HeadraceError(
                f"--set {setting}: write KEY=VALUE with a key of {shape}'s config.json, which are "
                f"{', '.join(sorted(config))}"
            )
        config[key] = _parsed(setting, text, config[key])
    return config


def _parsed(setting: str, text: str, example: Any) -> Any:
    """`text` as a value of the type that `example` has."""
    if isinstance(example, str):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    number = (int, float) if isinstance(example, float) else type(example)
    if not isinstance(value, number) or isinstance(value, bool) != isinstance(example, bool):
        raise HeadraceError(f"--set {setting}: the value must be like {json.dumps(example)}")
    return value
