"""Layers whose experts are fetched one by one: the same tokens, from fewer bytes."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SUPPORTED, tiny_model
from leftovers import our_threads
from rings import local_ring, manual_plan, run_all

from headrace.runtime.conversion.convert import convert
from headrace.runtime.expert_extents import split_block
from headrace.runtime.stage import Stage
from headrace.runtime.stage_config import StageConfig
from headrace.runtime.store import Store
from headrace.scheduler.errors import StoreError
from headrace.scheduler.placement import Plan, Tier
from headrace.scheduler.plan import MicroBatch, Pass, Sampling, Slice
from headrace.scheduler.request import Request, SamplingParams

SPLIT = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "glm4_moe",
         "minimax_m2")  # fmt: skip
STACKED = ("gpt_oss", "granitemoe")
QUICK = {"mixtral", "qwen3_moe", "deepseek_v3"}
LENGTHS = (1, 5, 20, 70)
NEW_TOKENS = 12
"""More passes than it takes to tell which experts are likely."""

WHOLE: dict[str, Any] = {"tier": Tier.DEVICE}
FEW_RINGS: list[dict[str, Any]] = [
    {"expert_slots": 2},
    {"stages": 2, "cyclic": True, "expert_slots": 3, "host_experts": 5, "token_budget": 24},
]
RINGS: list[dict[str, Any]] = [
    *FEW_RINGS,
    {"expert_slots": 1, "host_experts": 100, "token_budget": 16},
    {"expert_slots": 6, "token_budget": 16, "layers_a_visit": 2},
    {"expert_slots": 100, "tier": Tier.HOST},
    {"stages": 2, "expert_slots": 4, "token_budget": 24, "layers_a_visit": 2},
    {
        "stages": 2,
        "cyclic": True,
        "expert_slots": 7,
        "tier": (Tier.NVME, Tier.DEVICE, Tier.HOST),
        "graph_rows": 8,
    },
    {"expert_slots": 3, "host_experts": 6, "graph_rows": 8},
]


def make_store(name: str, folder: Path, fmt: str = "keep") -> Path:
    tiny_model(name).save_pretrained(folder / "checkpoint")
    path = folder / "store"
    convert(folder / "checkpoint", path, format=fmt, allow_missing_tokenizer=True)
    return path


class CallAgain:
    """What a CUDA graph does, without CUDA."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


def serve(path: Path, ring: dict[str, Any], device: str = "cpu") -> dict[int, list[int]]:
    """Half of the requests greedily, half sampled."""
    generator = torch.Generator().manual_seed(5)
    requests = []
    for i, length in enumerate(LENGTHS * 2):
        prompt = torch.randint(3, 256, (length,), generator=generator).tolist()
        params = SamplingParams(temperature=0.8 * (i % 2), max_tokens=NEW_TOKENS)
        requests.append(Request(i, prompt, params, seed=i))
    plan = manual_plan(Store.open(path), num_pages=24, **ring)
    capture = CallAgain() if device == "cpu" else None
    with local_ring(path, plan, device, capture=capture, storage="buffered") as pipeline:
        return run_all(plan, pipeline, requests)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SPLIT]
)
def test_splitting_does_not_change_a_token(name: str, tmp_path: Path) -> None:
    path = make_store(name, tmp_path)
    expected = serve(path, WHOLE)
    for ring in FEW_RINGS:
        assert serve(path, ring) == expected, ring


@pytest.mark.parametrize("name", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_no_pool_or_placement_changes_a_token(name: str, tmp_path: Path) -> None:
    path = make_store(name, tmp_path)
    expected = serve(path, WHOLE)
    for ring in RINGS:
        assert serve(path, ring) == expected, ring


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", ["keep", "nf4", "int4"])
@pytest.mark.parametrize("name", SPLIT)
def test_no_pool_changes_a_token_on_cuda(name: str, fmt: str, tmp_path: Path) -> None:
    """The same passes over the same ring: only where experts come from differs."""
    path = make_store(name, tmp_path, fmt)
    for ring in RINGS:
        whole = ring | {"expert_slots": 0, "host_experts": 0}
        assert serve(path, ring, "cuda") == serve(path, whole, "cuda"), ring


@pytest.mark.parametrize("fmt", ["nf4", "int4"])
def test_experts_of_packed_weights(fmt: str, tmp_path: Path) -> None:
    path = make_store("qwen3_moe", tmp_path, fmt)
    expected = serve(path, WHOLE)
    for ring in FEW_RINGS:
        assert serve(path, ring) == expected, ring


@pytest.mark.parametrize("name", SPLIT)
def test_experts_lie_last_one_by_one(name: str, tmp_path: Path) -> None:
    assert name in SUPPORTED
    store = Store.open(make_store(name, tmp_path, "nf4"))
    for block in store.layers:
        split = split_block(block)
        names = list(block.weights)
        experts = [name for name in names if ".experts." in name]
        assert names[len(names) - len(experts) :] == experts
        assert (split is not None) == bool(experts)
        if split is not None:
            assert split.experts[-1].offset + split.experts[-1].nbytes == block.nbytes


@pytest.mark.parametrize("name", STACKED)
def test_stacked_experts_stream_with_their_layer(name: str, tmp_path: Path) -> None:
    path = make_store(name, tmp_path)
    assert all(split_block(block) is None for block in Store.open(path).layers)
    assert serve(path, {"expert_slots": 2}) == serve(path, WHOLE)


GREEDY = Sampling(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, None, 0, ())


def decode(step: int, sequences: int) -> Pass:
    """One token of each of some sequences, in one micro-batch."""
    slices = [Slice(i, step, (7 + 11 * i + step,), (i,), GREEDY) for i in range(sequences)]
    return Pass(step, (MicroBatch(tuple(slices)),))


def config(path: Path, plan: Plan) -> StageConfig:
    return StageConfig(str(path), 0, plan, "cpu", 0, "float32", "buffered", 60.0, 1)


def expert_sizes(store: Store) -> set[int]:
    splits = [split_block(block) for block in store.layers]
    return {extent.nbytes for split in splits if split is not None for extent in split.experts}


@pytest.mark.parametrize("host_experts", [0, 100])
def test_a_pass_streams_what_its_tokens_reach(tmp_path: Path, host_experts: int) -> None:
    """deepseek_v3: two layers of 8 experts, of which a token reaches 2; one layer has none."""
    path = make_store("deepseek_v3", tmp_path)
    store = Store.open(path)
    (size,) = expert_sizes(store)
    plan = manual_plan(store, expert_slots=4, host_experts=host_experts)
    with Stage(config(path, plan)) as stage:
        stage.wait_host_tier()
        planned = plan.nvme_bytes_a_pass[0]
        for step in range(6):
            times = stage.run(stage.prepare(decode(step, 1))).times
            assert times.experts_used == 4
            assert times.experts_loaded <= 4
            loaded = times.experts_loaded * size
            expected = (planned, loaded) if host_experts else (planned + loaded, 0)
            assert (times.nvme_bytes, times.host_bytes) == expected
        assert stage.run(stage.prepare(decode(6, 16))).times.experts_used > 8


def test_experts_that_stay_are_not_loaded_again(tmp_path: Path) -> None:
    path = make_store("qwen3_moe", tmp_path)
    plan = manual_plan(Store.open(path), expert_slots=24)
    with Stage(config(path, plan)) as stage:
        for step in range(3):
            stage.run(stage.prepare(decode(step, 16)))
        times = stage.run(stage.prepare(decode(3, 16))).times
        assert times.experts_used > 12
        assert (times.experts_loaded, times.nvme_bytes) == (0, plan.nvme_bytes_a_pass[0])


def cut(path: Path, layer: int, left: int) -> None:
    block = Store.open(path).layers[layer]
    os.truncate(block.file, block.data_offset + left)


def test_a_file_that_ends_early_fails_the_pass_that_needs_it(tmp_path: Path) -> None:
    path = make_store("qwen3_moe", tmp_path)
    store = Store.open(path)
    split = split_block(store.layers[1])
    assert split is not None
    with Stage(config(path, manual_plan(store, expert_slots=4))) as stage:
        stage.run(stage.prepare(decode(0, 1)))
        cut(path, 1, split.dense.nbytes)
        with pytest.raises(StoreError, match="layer-00001"):
            stage.run(stage.prepare(decode(1, 16)))


def check_no_threads(path: Path, plan: Plan, error: type[Exception]) -> None:
    before = our_threads()
    with pytest.raises(error):
        Stage(config(path, plan))
    assert our_threads() == before


def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """Each of these fails when storage, and some when host tier and ring, are up."""
    path = make_store("qwen3_moe", tmp_path)
    plan = manual_plan(Store.open(path), expert_slots=4, host_experts=4, tier=Tier.HOST)
    fields = {name: getattr(plan, name) for name in Plan.__dataclass_fields__}
    check_no_threads(path, Plan(**fields | {"slot_bytes": 4096}), AssertionError)
    check_no_threads(path, Plan(**fields | {"expert_slot_bytes": 4097}), AssertionError)


def close_early(path: Path, plans: Sequence[Plan]) -> None:
    before = our_threads()
    for plan in plans:
        stage = Stage(config(path, plan))
        stage.close()
        stage.close()
    assert our_threads() == before


def test_closing_early_ends_every_thread(tmp_path: Path) -> None:
    path = make_store("qwen3_moe", tmp_path)
    store = Store.open(path)
    close_early(path, [manual_plan(store, expert_slots=n, host_experts=n) for n in (1, 24)])
