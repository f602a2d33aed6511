import json
from pathlib import Path

import pytest
import torch
from architectures import tiny_config

from headrace.runtime.rope import context_limit
from headrace.runtime.skeleton import Skeleton, load_config
from headrace.runtime.stand_ins import StandIns
from headrace.scheduler.errors import StoreError, UnsupportedModelError


def test_missing_configuration_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"config\.json cannot be read"):
        load_config(tmp_path / "absent")


def test_unknown_model_type_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(UnsupportedModelError, match="no_such_model"):
        load_config(tmp_path)


def test_encoder_is_unsupported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UnsupportedModelError, match="not a causal language model"):
        load_config(tmp_path)


def test_configuration_survives_the_file(tmp_path: Path) -> None:
    tiny_config("gemma2").save_pretrained(tmp_path)
    config = load_config(tmp_path)
    assert (config.model_type, config.hidden_size) == ("gemma2", 64)


def test_skeleton_leaves_the_configuration_alone_and_holds_no_weights() -> None:
    config = tiny_config("llama")
    before = config.to_dict()
    skeleton = Skeleton(config, torch.bfloat16)
    assert config.to_dict() == before
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in skeleton.model.parameters())
    assert len(skeleton.layers) == 3


def test_roles_of_a_dense_model() -> None:
    skeleton = Skeleton(tiny_config("llama"), torch.float32)
    names = [
        "model.embed_tokens.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
    ]
    roles = skeleton.classify(names)
    assert [roles[n].block for n in names[:6]] == ["embed", 1, 1, 1, "head", "head"]
    assert [roles[n].kind for n in names] == [
        "other", "linear", "linear", "other", "other", "other", "unused",
    ]  # fmt: skip
    in_layer = sorted(names[1:4], key=lambda n: roles[n].order)
    assert in_layer == [names[3], names[2], names[1]]
    assert roles[names[1]].target == "model.layers.1.mlp.down_proj.weight"


def test_experts_of_one_expert_are_adjacent() -> None:
    skeleton = Skeleton(tiny_config("mixtral"), torch.float32)
    prefix = "model.layers.0.block_sparse_moe"
    names = [f"{prefix}.experts.{e}.w{w}.weight" for w in (1, 2, 3) for e in range(4)]
    roles = skeleton.classify([*names, f"{prefix}.gate.weight"])
    ordered = sorted(names, key=lambda n: roles[n].order)
    wanted = [f"{prefix}.experts.{e}.w{w}.weight" for e in range(4) for w in (1, 3, 2)]
    assert ordered == wanted
    first = roles[wanted[1]]
    assert (first.attribute, first.expert, first.part) == ("gate_up_proj", 0, 1)
    assert roles[f"{prefix}.gate.weight"].kind == "router"


def test_fused_experts_map_to_themselves() -> None:
    skeleton = Skeleton(tiny_config("gpt_oss"), torch.float32)
    prefix = "model.layers.0.mlp.experts"
    roles = skeleton.classify([f"{prefix}.gate_up_proj", f"{prefix}.gate_up_proj_bias"])
    stack, bias = roles.values()
    assert (stack.kind, stack.expert, stack.part) == ("expert", None, None)
    assert bias.kind == "other"


def test_tied_head_is_unused() -> None:
    skeleton = Skeleton(tiny_config("llama", tie_word_embeddings=True), torch.float32)
    assert skeleton.tied
    assert skeleton.classify(["lm_head.weight"])["lm_head.weight"].kind == "unused"


def test_layer_shapes_tell_dense_from_sparse_and_keys_from_values() -> None:
    config = tiny_config("deepseek_v3")
    shapes = Skeleton(config, torch.float32, expand=True).layer_shapes()
    assert [(s.kv_heads, s.k_dim, s.v_dim) for s in shapes] == [(4, 24, 12)] * 3
    dense, sparse, _ = shapes
    assert dense.parameters == dense.active_parameters
    expert = 3 * 64 * 32
    assert sparse.parameters - sparse.active_parameters == 6 * expert
    assert dense.largest_matrix == 96 * 64


def test_rotations_that_depend_on_the_call_limit_the_context() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128}
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = tiny_config(
        "phi3", rope_parameters=rope | factors, original_max_position_embeddings=128
    )
    assert context_limit(config) == 128
    assert context_limit(tiny_config("llama")) is None


def test_a_slice_of_all_stand_ins_is_no_copy() -> None:
    layers = StandIns(Skeleton(tiny_config("llama"), torch.float32).layers).modules
    assert layers[:3] is layers and layers[: len(layers) + 1] is layers
    assert list(layers[1:]) == [layers[1], layers[2]] and layers[-1] is layers[2]
    assert list(layers[::-1]) == [layers[2], layers[1], layers[0]]
