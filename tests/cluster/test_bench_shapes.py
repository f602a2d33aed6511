"""The shapes are those of the real models, and every kind of them runs through the store's writer."""

from math import prod

import pytest

from headrace.cluster.bench.random_store import tensors_of
from headrace.cluster.bench.shapes import SHAPES, config_of
from headrace.scheduler.errors import HeadraceError

PARAMETERS = {
    "1b": 1_235_814_400,
    "8b": 8_030_261_248,
    "70b": 70_553_706_496,
    "405b": 405_853_388_800,
    "qwen3-30b": 30_532_122_624,
    "qwen3-235b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v3": 671_026_419_200,
}
"""As their authors count them; DeepSeek V3 without its multi-token prediction layer."""


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_real_model(shape: str) -> None:
    count = sum(prod(entry.shape) for entry in tensors_of(config_of(shape)))
    assert count == PARAMETERS[shape]


def test_names_are_those_of_the_real_checkpoint() -> None:
    mixtral = {entry.name: entry.shape for entry in tensors_of(config_of("mixtral-8x7b", 1))}
    assert mixtral["model.layers.0.block_sparse_moe.experts.7.w2.weight"] == (4096, 14336)
    deepseek = {entry.name: entry.shape for entry in tensors_of(config_of("deepseek-v3", 4))}
    assert deepseek["model.layers.2.mlp.down_proj.weight"] == (7168, 18432)
    assert deepseek["model.layers.3.mlp.experts.255.up_proj.weight"] == (2048, 7168)
    assert deepseek["model.layers.3.mlp.shared_experts.up_proj.weight"] == (2048, 7168)
    assert deepseek["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert "lm_head.weight" not in {entry.name for entry in tensors_of(config_of("1b", 1))}


def test_settings_change_what_the_shape_has() -> None:
    config = config_of("8b", 2, ["hidden_size=64", "tie_word_embeddings=true", "rope_theta=1"])
    assert config["num_hidden_layers"] == 2
    assert config["hidden_size"] == 64
    assert config["tie_word_embeddings"] is True
    assert SHAPES["8b"]["hidden_size"] == 4096


@pytest.mark.parametrize(
    ("shape", "layers", "setting", "said"),
    [
        ("9b", 1, "", "no shape is called '9b'; there are 1b, 8b"),
        ("8b", 33, "", "8b has 32 layers: --layers takes 1 to 32"),
        ("8b", 0, "", "--layers takes 1 to 32"),
        ("8b", 1, "hidden_size", "write KEY=VALUE"),
        ("8b", 1, "width=3", "KEY=VALUE with a key of 8b's config.json"),
        ("8b", 1, "hidden_size=wide", "must be like 4096"),
        ("8b", 1, "hidden_size=1.5", "must be like 4096"),
        ("8b", 1, "tie_word_embeddings=1", "must be like false"),
    ],
)
def test_mistakes_are_named(shape: str, layers: int, setting: str, said: str) -> None:
    with pytest.raises(HeadraceError, match=said):
        config_of(shape, layers, [setting] if setting else [])
