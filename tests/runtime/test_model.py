"""Layers run one at a time on packed, paged rows give transformers' own results, or are refused."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SUPPORTED, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from headrace.runtime.batch import Batch
from headrace.runtime.bnb import functional as bnb
from headrace.runtime.conversion.layer_facts import signature
from headrace.runtime.conversion.quantize import STORE_DTYPES
from headrace.runtime.conversion.selfcheck import check
from headrace.runtime.conversion.shrink import shrink
from headrace.runtime.kv.store import KVStore
from headrace.runtime.manifest import Block, TensorSpec, WeightSpec
from headrace.runtime.model import StageModel
from headrace.runtime.skeleton import BlockKey, Role, Skeleton
from headrace.scheduler.errors import UnsupportedModelError
from headrace.scheduler.plan import MicroBatch, Slice


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_equals_transformers(model_type: str) -> None:
    check(tiny_config(model_type))


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
def test_refused_with_the_reason(model_type: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check(tiny_config(model_type))


@pytest.mark.parametrize("tied", [False, True])
def test_head_tied_or_not(tied: bool) -> None:
    check(tiny_config("llama", tie_word_embeddings=tied))


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
def test_scaled_rotations(rope: dict[str, object]) -> None:
    settings = {"hidden_size": 384, "rope_parameters": {"rope_theta": 1e4, **rope}}
    check(tiny_config("llama", **settings))


def test_shrinking_keeps_head_ratios_and_every_kind_of_layer() -> None:
    config = tiny_config(
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


def test_full_size_mixture_is_checked_through_its_shrunken_self() -> None:
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
    check(tiny_config("deepseek_v3", **changes))


def test_signature_sees_layers_as_equal_but_for_their_index() -> None:
    layers: list[nn.Module] = Skeleton(tiny_config("llama"), torch.float32).layers
    assert len({signature(layer) for layer in layers}) == 1


def test_quantized_stages_equal_their_dequantized_selves() -> None:
    """Two stages over a 4-bit mixture, streamed through rebinding, against transformers."""
    config = tiny_config("qwen3_moe", moe_intermediate_size=64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    source = packed_source(model, Skeleton(config, torch.float32))
    tokens = tuple(range(5, 75))
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
        logits = run_stages(source, [(0, 2), (1,)], tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


class PackedSource:
    """Blocks in memory with every linear and expert in NF4."""

    def __init__(self, config: Any, blocks: dict[BlockKey, tuple[Block, bytearray]]) -> None:
        self.config = config.to_dict()
        self.blocks = blocks
        self.embed, self.head = blocks["embed"][0], blocks["head"][0]
        self.layers = [blocks[i][0] for i in range(config.num_hidden_layers)]
        self.layer_shapes = Skeleton(config, torch.float32).layer_shapes()
        self._data = {block.name: data for block, data in blocks.values()}

    def read_block(self, block: Block) -> bytearray:
        return self._data[block.name]


def packed_source(model: Any, skeleton: Skeleton) -> PackedSource:
    """Quantizes the model's matrices, leaving their rounded values in the model."""
    on_disk = revert_weight_conversion(model, model.state_dict())
    roles = skeleton.classify(on_disk)
    data: dict[BlockKey, bytearray] = defaultdict(bytearray)
    weights: dict[BlockKey, dict[str, WeightSpec]] = defaultdict(dict)

    def place(block: BlockKey, tensor: Tensor) -> TensorSpec:
        spec = TensorSpec(
            STORE_DTYPES[tensor.dtype], tuple(tensor.shape), len(data[block]), tensor.nbytes
        )
        data[block] += tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        data[block] += bytes(-len(data[block]) % 256)
        return spec

    for name, tensor in sorted(on_disk.items(), key=lambda item: roles[item[0]].order):
        role, shape = roles[name], tuple(tensor.shape)
        if role.kind not in ("linear", "expert"):
            spec = WeightSpec("raw", shape, {"data": place(role.block, tensor)})
        else:
            packed, state = bnb.quantize_4bit(tensor.contiguous(), blocksize=64, quant_type="nf4")
            parts = {"data": packed, "absmax": state.absmax, "code": state.code}
            placed = {part: place(role.block, value) for part, value in parts.items()}
            spec = WeightSpec("nf4", shape, placed, blocksize=64)
            tensor.copy_(bnb.dequantize_4bit(packed, state))
            put_back(model, role, tensor)
        weights[role.block][name] = spec
    return PackedSource(
        model.config,
        {
            key: (Block(str(key), Path(), 0, len(data[key]), "", specs), data[key])
            for key, specs in weights.items()
        },
    )


def put_back(model: Any, role: Role, tensor: Tensor) -> None:
    place = getattr(model.get_submodule(role.module), role.attribute).data
    if role.expert is not None:
        place = place[role.expert]
    if role.part is not None:
        place = place.chunk(2)[role.part]
    place.copy_(tensor)


def run_stages(
    source: PackedSource, shares: list[tuple[int, ...]], tokens: tuple[int, ...]
) -> Tensor:
    """The layers of each share on a model of their own, visited in layer order, one slot a stage."""
    cpu = torch.device("cpu")
    last = len(source.layers) - 1
    owner = {layer: i for i, share in enumerate(shares) for layer in share}
    stages = [
        StageModel(source, share, device=cpu, dtype=torch.float32, with_embedding=0 in share,
                   with_head=True)
        for share in shares
    ]  # fmt: skip
    batch = Batch.build(MicroBatch((Slice(0, 0, tokens, (1, 2), None),)), cpu)
    x = stages[owner[0]].prepare(batch).x
    with KVStore(dict(enumerate(source.layer_shapes)), 3, torch.float32, cpu) as kv:
        for layer, block in enumerate(source.layers):
            stage = stages[owner[layer]]
            slot = torch.frombuffer(source.read_block(block), dtype=torch.uint8).clone()
            stage.bind(layer, slot)
            x = stage.run_layer(layer, x, stage.prepare(batch), kv)
            slot.zero_()  # its owner's again: nothing may look at it after the layer has run
    return stages[owner[last]].logits(x)
