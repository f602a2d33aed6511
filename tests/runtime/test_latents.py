"""Pages that keep latents: found by trying, equal to transformers, and as small as they should be."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config
from rings import CallAgain, local_ring, manual_plan, run_all
from small_shapes import small_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from whole import WholeModel

from headrace.cluster.bench.random_store import write_store
from headrace.cluster.bench.shapes import config_of
from headrace.runtime.conversion import selfcheck
from headrace.runtime.conversion.convert import convert
from headrace.runtime.latents import find_latents, keeps_latents
from headrace.runtime.matmul.packed_cpu import PackedLayout, has_kernel
from headrace.runtime.plugs import attention_modules
from headrace.runtime.shape import model_shape
from headrace.runtime.skeleton import Skeleton, parse_config
from headrace.runtime.store import Store
from headrace.scheduler.kv_format import FORMATS
from headrace.scheduler.placement import Tier
from headrace.scheduler.plan import Slice
from headrace.scheduler.request import Request, SamplingParams

NAMES = ["deepseek_v2", "deepseek_v3"]
WIDE = {
    "kv_lora_rank": 32, "qk_rope_head_dim": 16, "head_dim": 16, "q_lora_rank": 64,
    "first_k_dense_replace": 3,
}  # fmt: skip
"""Settings of tiny models that every format has a way with. Layers are dense: mixtures are not recorded,
and how a router rounds depends on the rows of a call."""

SIZES = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "vocab_size",
    "num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim",
    "qk_nope_head_dim", "v_head_dim", "n_routed_experts", "num_experts_per_tok", "n_group",
    "topk_group", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def test_attentions_hand_on_latents_where_they_are_found_to() -> None:
    for name in NAMES:
        skeleton = Skeleton(tiny_config(name), torch.float32)
        assert all(map(keeps_latents, skeleton.layers))
        shapes = skeleton.layer_shapes()
        assert {(s.kv_heads, s.k_dim, s.v_dim, s.latent) for s in shapes} == {(1, 8, 16, True)}
        assert not any(
            map(keeps_latents, Skeleton(tiny_config(name), torch.float32, expand=True).layers)
        )
    assert not any(map(keeps_latents, Skeleton(tiny_config("llama"), torch.float32).layers))


@pytest.mark.parametrize("name", ["minicpm3", "glm4_moe_lite", "youtu", "axk1"])
def test_other_architectures_of_this_attention(name: str) -> None:
    settings = {key: getattr(tiny_config("deepseek_v3"), key) for key in SIZES}
    config = AutoConfig.for_model(name, **settings)
    assert selfcheck.check(config)


class Attention(nn.Module):
    """Expands latents; `turned` in a way of its own."""

    def __init__(self, turned: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.kv_b_proj = nn.Linear(16, 3 * (8 + 12), bias=bias)
        self.turned = turned

    def expand_kv(self, c: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        made = self.kv_b_proj(c[:, 0]).view(*c.shape[:1], c.shape[2], 3, 20).transpose(1, 2)
        k = torch.cat([made[..., :8], r.expand(-1, 3, -1, -1)], dim=-1)
        return (k.roll(1, -1) if self.turned else k), made[..., 8:]


def test_other_expansions_are_left_alone() -> None:
    for module, known in (
        (Attention(), True),
        (Attention(turned=True), False),
        (Attention(bias=True), False),
    ):
        found = find_latents(module, module.kv_b_proj, 4)
        assert (found is not None) == known
        if found is not None:
            assert (found.heads, found.rank, found.shared, found.key, found.value) == (
                3,
                16,
                4,
                8,
                12,
            )


def test_a_model_that_latents_change_keeps_keys_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest_error = selfcheck._largest_error

    def spoilt(config: Any, *, expand: bool) -> Any:
        error = largest_error(config, expand=expand)
        return error if expand else selfcheck._Error(1.0, "for a test")

    assert selfcheck.check(tiny_config("deepseek_v3"))
    assert not selfcheck.check(tiny_config("llama"))
    monkeypatch.setattr(selfcheck, "_largest_error", spoilt)
    tiny("deepseek_v3").save_pretrained(tmp_path / "checkpoint")
    store = convert(
        tmp_path / "checkpoint", tmp_path / "store", format="keep",
        self_check=selfcheck.check, allow_missing_tokenizer=True,
    )  # fmt: skip
    assert [(s.kv_heads, s.k_dim, s.latent) for s in store.layer_shapes] == [(4, 32, False)] * 3
    model = WholeModel(tmp_path / "store")
    assert model.logits([Slice(0, 0, (5, 6, 7), (2,), None)]).isfinite().all()


def tiny(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = tiny_config(name, **(WIDE | changes))
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    return model.eval()


@pytest.fixture(scope="module", params=NAMES)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny(request.param)
    model.save_pretrained(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "store", format="keep", allow_missing_tokenizer=True)
    return model, folder / "store"


CUTS = [[200], [64, 128, 200], [1, 63, 65, 130, 200], [100, *range(120, 201)]]


def in_pieces(path: Path, tokens: list[int], cuts: list[int], fmt: str, **more: Any) -> Tensor:
    model = WholeModel(path, kv_format=fmt, **more)
    pages = tuple(range(9, 1, -2))
    return torch.cat(
        [
            model.logits([Slice(0, a, tuple(tokens[a:b]), pages, None)])
            for a, b in pairwise([0, *cuts])
        ]
    )


def random_tokens(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 250, (count,), generator=generator).tolist()


def test_logits_are_transformers(made: tuple[Any, Path]) -> None:
    model, path = made
    tokens = random_tokens(200)
    with torch.no_grad():
        want = model(torch.tensor([tokens]), use_cache=False).logits[0]
    for cuts in CUTS:
        error = (in_pieces(path, tokens, cuts, "fp32") - want).abs().max() / want.abs().max()
        assert error < 1e-5, cuts
    for fmt, bound in (("int8", 0.05), ("int4", 0.5)):
        error = (in_pieces(path, tokens, CUTS[0], fmt) - want).abs().max() / want.abs().max()
        assert 1e-5 < error < bound, fmt


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_any_chunks_give_the_same_bits(made: tuple[Any, Path], fmt: str) -> None:
    tokens = random_tokens(200)
    want = in_pieces(made[1], tokens, CUTS[0], fmt)
    for cuts in CUTS[1:]:
        assert torch.equal(in_pieces(made[1], tokens, cuts, fmt), want), cuts


RINGS: list[dict[str, Any]] = [
    {"stages": 1, "tier": Tier.DEVICE, "token_budget": 4096},
    {"stages": 2, "cyclic": True, "token_budget": 100, "passes_in_flight": 2, "ahead": 1},
    {"stages": 3, "token_budget": 40, "num_tails": 2},
    {"stages": 1, "tier": Tier.DEVICE, "token_budget": 70, "num_pages": 5},
]


@pytest.mark.parametrize(
    "fmt", ["int8", *(pytest.param(fmt, marks=pytest.mark.slow) for fmt in ("fp32", "int4"))]
)
def test_every_ring_gives_the_same_tokens(made: tuple[Any, Path], fmt: str) -> None:
    """Of several stages, streamed, in chunks, with preemption."""
    params = SamplingParams(temperature=0.8, max_tokens=24)
    prompts = [random_tokens(n) for n in (3, 63, 65, 190)]
    found = []
    for ring in RINGS:
        plan = manual_plan(Store.open(made[1]), kv_format=fmt, **ring)
        with local_ring(made[1], plan) as pipeline:
            requests = [Request(i, list(p), params, seed=100 + i) for i, p in enumerate(prompts)]
            found.append(run_all(plan, pipeline, requests))
    assert found == found[:1] * len(RINGS)


def test_decodes_in_lanes(tmp_path: Path) -> None:
    model = tiny("deepseek_v3")
    model.save_pretrained(tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "store", format="nf4", allow_missing_tokenizer=True)
    found = []
    for rows in (0, 8):
        capture = CallAgain()
        plan = manual_plan(Store.open(tmp_path / "store"), tier=Tier.DEVICE, graph_rows=rows)
        with local_ring(tmp_path / "store", plan, capture=capture) as pipeline:
            params = SamplingParams(temperature=0.0, max_tokens=70)
            requests = [Request(i, random_tokens(5 + i), params, seed=i) for i in range(3)]
            found.append(run_all(plan, pipeline, requests))
        assert (sum(capture.replays) > 0) == (rows > 0)
    assert found[0] == found[1]


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
def test_expansions_may_be_quantized(tmp_path: Path, fmt: str) -> None:
    """They give what they give when they are dequantized before; where layers are repacked, too."""
    tiny("deepseek_v3", kv_lora_rank=64).save_pretrained(tmp_path / "checkpoint")
    found = []
    for expand in (False, True):
        path = tmp_path / str(expand)
        convert(
            tmp_path / "checkpoint", path, format=fmt,
            self_check=lambda _, latents=not expand: latents, allow_missing_tokenizer=True,
        )  # fmt: skip
        found.append(in_pieces(path, random_tokens(70), [66, 70], "fp32"))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    if not has_kernel():
        return  # nothing is repacked on this CPU
    plain, repacked = (
        in_pieces(
            tmp_path / "False",
            random_tokens(70),
            [66, 70],
            "bf16",
            dtype=torch.bfloat16,
            layout=layout,
        )
        for layout in (None, PackedLayout(8))
    )
    assert (repacked - plain).norm() < 0.02 * plain.norm()


def test_pages_of_deepseek_v3_take_72_kib_a_layer() -> None:
    config = parse_config(config_of("deepseek-v3", layers=4), "test")
    shape = Skeleton(config, torch.bfloat16).layer_shapes()[3]
    assert shape.page_bytes(FORMATS["bf16"]) == 64 * 576 * 2 == 72 << 10
    assert shape.page_bytes(FORMATS["int8"]) == 64 * (576 + 4)
    assert shape.page_bytes(FORMATS["int4"]) == 64 * (288 + 8)
    expanded = Skeleton(config, torch.bfloat16, expand=True).layer_shapes()[3]
    assert expanded.page_bytes(FORMATS["bf16"]) == 64 * 128 * (192 + 128) * 2


def test_the_planner_counts_latents(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", small_config("deepseek-v3"), "nf4")
    config = small_config("deepseek-v3")
    numbers = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    shape = model_shape(store, "bfloat16")
    assert set(shape.layer_kv_bytes) == {64 * numbers * 2}
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    assert shape.attention_size == heads * (numbers + rank)


def test_modules_are_still_of_their_own_class() -> None:
    """What transformers asks of a module's class holds: its name, and whose it is."""
    for layer in Skeleton(tiny_config("deepseek_v3"), torch.float32).layers:
        for module in attention_modules(layer):
            assert type(module).__name__ == "DeepseekV3Attention"
