"""Layers run one at a time on packed, paged rows give transformers' own results, or are refused."""

import pytest
import torch
from torch import nn

from headrace.runtime.layer_facts import signature
from headrace.runtime.selfcheck import check
from headrace.runtime.shrink import shrink
from headrace.runtime.skeleton import Skeleton
from headrace.scheduler.errors import UnsupportedModelError

SUPPORTED = [
    "llama",
    "mistral",
    "ministral3",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "olmo2",
    "olmo3",
    "olmoe",
    "glm",
    "glm4",
    "glm4_moe",
    "cohere",
    "cohere2",
    "starcoder2",
    "stablelm",
    "granite",
    "granitemoe",
    "gpt_neox",
    "smollm3",
    "ernie4_5",
    "hunyuan_v1_dense",
    "exaone4",
    "nemotron",
    "minimax_m2",
    "seed_oss",
    "apertus",
    "arcee",
]


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_equals_transformers(model_type: str, architectures) -> None:
    check(architectures.tiny_config(model_type))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("phimoe", "depend on a mask"),
        ("llama4_text", "depend on a mask"),
        ("qwen3_next", "state that Headrace does not keep"),
        ("lfm2", "state that Headrace does not keep"),
        ("gpt2", "num_attention_heads"),
    ],
)
def test_refused_with_the_reason(model_type: str, reason: str, architectures) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check(architectures.tiny_config(model_type))


def test_every_supported_architecture_is_listed(architectures) -> None:
    assert sorted(SUPPORTED) == sorted(architectures.SUPPORTED)


@pytest.mark.parametrize("tied", [False, True])
def test_head_tied_or_not(tied: bool, architectures) -> None:
    check(architectures.tiny_config("llama", tie_word_embeddings=tied))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48,
         "original_max_position_embeddings": 4096},
    ],
)  # fmt: skip
def test_scaled_rotations(rope: dict[str, object], architectures) -> None:
    settings = {"hidden_size": 384, "rope_parameters": {"rope_theta": 1e4, **rope}}
    check(architectures.tiny_config("llama", **settings))


def test_shrinking_keeps_head_ratios_and_every_kind_of_layer(architectures) -> None:
    config = architectures.tiny_config(
        "gemma3_text",
        hidden_size=2048,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=1024,
    )
    small = shrink(config)
    assert (small.num_attention_heads, small.num_key_value_heads) == (8, 2)
    assert small.num_hidden_layers == 6
    assert small.sliding_window == 8
    assert config.hidden_size == 2048


def test_full_size_mixture_is_checked_through_its_shrunken_self(architectures) -> None:
    changes = {
        "hidden_size": 7168,
        "num_hidden_layers": 20,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    }
    check(architectures.tiny_config("deepseek_v3", **changes))


def test_signature_sees_layers_as_equal_but_for_their_index(architectures) -> None:
    layers: list[nn.Module] = Skeleton(architectures.tiny_config("llama"), torch.float32).layers
    assert len({signature(layer) for layer in layers}) == 1
