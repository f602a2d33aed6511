"""LoRA adapters over rings inside this process: every request gets what its merged model would say."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import many_adapters, merged_tokens, save_adapter
from rings import CallAgain, local_ring, manual_plan, run_all
from safetensors.torch import load_file, save_file
from stored import tiny_store

from headrace.cluster.pipeline import LocalPipeline
from headrace.runtime.adapters.directory import WEIGHTS, open_adapter
from headrace.runtime.store import Store
from headrace.scheduler.errors import StoreError
from headrace.scheduler.limits import limits_of
from headrace.scheduler.placement import Tier
from headrace.scheduler.plan import Adapter, MoveKind
from headrace.scheduler.request import FinishReason, Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler

TOKENS = 10


def request(
    number: int, prompt: Sequence[int], adapter: Adapter | None, *, keep: bool = False
) -> Request:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    return Request(number, list(prompt), params, seed=0, adapter=adapter, keep=keep)


def prompts(count: int, length: int = 10, seed: int = 1) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, 250) for _ in range(length + 7 * i)] for i in range(count)]


class Case:
    """A store with 8 adapters, and what transformers says to prompts with each of them merged, and with none."""

    def __init__(self, model: str, folder: Path) -> None:
        self.model, self.store = model, tiny_store(model, folder)
        self.paths = many_adapters(model, folder)
        self.adapters = [None, *(open_adapter(path).adapter for path in self.paths)]
        self.prompts = prompts(len(self.adapters))
        pairs = zip([None, *self.paths], self.prompts, strict=True)
        self.said = [merged_tokens(model, path, [prompt], TOKENS)[0] for path, prompt in pairs]

    def requests(self) -> list[Request]:
        pairs = enumerate(zip(self.prompts, self.adapters, strict=True))
        return [request(i, prompt, adapter) for i, (prompt, adapter) in pairs]

    def run(self, device: str = "cpu", **plan: Any) -> tuple[list[list[int]], Scheduler]:
        given = {"num_pages": 40, "adapter_slots": 8, **plan}
        made = manual_plan(Store.open(self.store), **given)
        scheduler = Scheduler(limits_of(made))
        with local_ring(self.store, made, device) as ring:
            outputs = run_all(made, ring, self.requests(), scheduler)
        scheduler.holdings.check_integrity()
        return [outputs[i] for i in range(len(self.said))], scheduler


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("llama", tmp_path_factory.mktemp("llama"))


def test_adapters_change_what_is_said(case: Case) -> None:
    plain = [merged_tokens(case.model, None, [prompt], TOKENS)[0] for prompt in case.prompts]
    assert plain[0] == case.said[0]
    differs = [a != b for a, b in zip(plain[1:], case.said[1:], strict=True)]
    assert sum(differs) >= 5  # a tiny gemma likes to repeat its last token, whatever adapters say


@pytest.mark.parametrize("stages", [1, 2])
def test_eight_adapters_in_one_batch_say_what_merged_models_do(case: Case, stages: int) -> None:
    assert case.run(stages=stages)[0] == case.said


@pytest.mark.parametrize("slots", [1, 3])
def test_fewer_slots_than_adapters(case: Case, slots: int) -> None:
    assert case.run(stages=2, adapter_slots=slots, ahead=1)[0] == case.said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("slots", [2, 8])
@pytest.mark.parametrize("graph_rows", [0, 16])
def test_eight_adapters_on_cuda(case: Case, slots: int, graph_rows: int) -> None:
    tier = Tier.DEVICE if graph_rows else Tier.HOST
    said, _ = case.run("cuda", adapter_slots=slots, graph_rows=graph_rows, tier=tier)
    assert said == case.said


def test_requests_that_give_way_come_back_to_their_adapters(llama: Case) -> None:
    plan = manual_plan(Store.open(llama.store), num_pages=6, adapter_slots=3, kv_format="fp32")
    scheduler = Scheduler(limits_of(plan))
    chance = random.Random(3)
    several = [[chance.randrange(3, 250) for _ in range(60)] for _ in range(6)]
    asked = [request(i, prompt, llama.adapters[1 + i % 3]) for i, prompt in enumerate(several)]
    with local_ring(llama.store, plan) as ring:
        outputs = run_all(plan, ring, asked, scheduler)
    assert scheduler.num_preemptions > 0
    for i, prompt in enumerate(several):
        assert outputs[i] == merged_tokens("llama", llama.paths[i % 3], [prompt], TOKENS)[0]


def test_streamed_layers_and_several_passes_under_way(llama: Case) -> None:
    """Streamed, in several passes at once, over three stages that take turns."""
    said, _ = llama.run(stages=3, cyclic=True, passes_in_flight=2, ahead=1, adapter_slots=4)
    assert said == llama.said


def test_decodes_with_adapters_are_not_replayed(llama: Case) -> None:
    """Those without are, beside them."""
    plan = manual_plan(
        Store.open(llama.store), num_pages=40, adapter_slots=8, graph_rows=16, tier=Tier.DEVICE
    )
    again = CallAgain()
    with local_ring(llama.store, plan, capture=again) as ring:
        outputs = run_all(plan, ring, llama.requests())
        assert [outputs[i] for i in range(len(llama.said))] == llama.said
        replayed = sum(again.replays)
        alone = [request(i, llama.prompts[0], None) for i in range(2)]
        assert run_all(plan, ring, alone) == {0: llama.said[0], 1: llama.said[0]}
    assert sum(again.replays) > replayed


def test_a_prefix_is_shared_by_requests_of_one_adapter_alone(llama: Case) -> None:
    [prompt] = prompts(1, length=150)
    plan = manual_plan(Store.open(llama.store), num_pages=40, adapter_slots=8)
    scheduler = Scheduler(limits_of(plan))
    with local_ring(llama.store, plan) as ring:
        found = []
        for number, which in enumerate((None, 1, 2, 1, None)):
            before = scheduler.kv_stats().hits.total
            run_all(
                plan,
                ring,
                [asked := request(number, prompt, llama.adapters[which or 0])],
                scheduler,
            )
            found.append(scheduler.kv_stats().hits.total - before)
            path = llama.paths[which - 1] if which else None
            assert asked.output == merged_tokens("llama", path, [prompt], TOKENS)[0]
    assert found == [0, 0, 0, 2, 2]


def test_pages_in_host_memory_are_an_adapters_own(llama: Case) -> None:
    """Pages of several adapters over the same tokens go out to host RAM and come back."""
    [prompt] = prompts(1, length=150)
    plan = manual_plan(
        Store.open(llama.store), num_pages=6, host_pages=20, adapter_slots=2, token_budget=128
    )
    scheduler = Scheduler(limits_of(plan))
    which = [1, 2, 0, 1, 2, 0]
    asked = [request(i, prompt, llama.adapters[each], keep=True) for i, each in enumerate(which)]
    with local_ring(llama.store, plan) as ring:
        for each in asked:  # one after the other: pages are found again
            run_all(plan, ring, [each], scheduler)
    moved = scheduler.kv_stats().moved
    assert moved[MoveKind.OUT] > 0
    assert moved[MoveKind.IN] > 0
    for each, number in zip(asked, which, strict=True):
        path = llama.paths[number - 1] if number else None
        assert each.output == merged_tokens("llama", path, [prompt], TOKENS)[0]


def test_adapters_are_read_again_where_host_memory_keeps_none(llama: Case) -> None:
    plan = manual_plan(Store.open(llama.store), num_pages=40, adapter_slots=1)
    with local_ring(llama.store, plan, adapter_host_memory=0) as ring:
        scheduler = Scheduler(limits_of(plan))
        for _ in range(2):
            outputs = run_all(plan, ring, llama.requests(), scheduler)
            assert [outputs[i] for i in range(len(llama.said))] == llama.said


def test_an_adapter_that_is_gone_ends_its_requests_alone(llama: Case, tmp_path: Path) -> None:
    """It is checked where it is named, and may be gone when it is needed."""
    shutil.copytree(llama.paths[0], tmp_path / "gone")
    gone = open_adapter(tmp_path / "gone").adapter
    plan = manual_plan(Store.open(llama.store), num_pages=40, adapter_slots=2)
    with local_ring(llama.store, plan) as ring:
        ring.check_adapter(gone)
        shutil.rmtree(tmp_path / "gone")
        scheduler = Scheduler(limits_of(plan))
        [prompt, other] = prompts(2)
        lost, good = request(0, prompt, gone), request(1, other, llama.adapters[3])
        outputs = run_all(plan, ring, [lost, good], scheduler)
        assert lost.finish_reason is FinishReason.ABORT
        assert lost.output == []
        assert outputs == {1: merged_tokens("llama", llama.paths[2], [other], TOKENS)[0]}
    scheduler.holdings.check_integrity()


def check(llama: Case, path: Path, rank: int = 16) -> None:
    plan = manual_plan(Store.open(llama.store), stages=2, adapter_slots=1, adapter_rank=rank)
    with local_ring(llama.store, plan) as ring:
        assert isinstance(ring, LocalPipeline)
        ring.check_adapter(open_adapter(path).adapter)


def test_an_adapter_of_another_model_is_refused(llama: Case, tmp_path: Path) -> None:
    wrong = save_adapter("gemma", tmp_path / "a", target_modules=["q_proj", "down_proj"])
    check(llama, wrong)  # as large, by chance
    file = wrong / WEIGHTS
    tensors = {
        name: torch.zeros(len(t) + 8 if "lora_B" in name else len(t), t.shape[1])
        for name, t in load_file(file).items()
    }
    save_file(tensors, file)
    with pytest.raises(
        StoreError, match=r"made for another model \(.*\): its model\.layers\.0\..* is \[.*Name one"
    ):
        check(llama, wrong)


def test_what_the_model_does_not_have_is_refused_by_name(llama: Case, tmp_path: Path) -> None:
    path = save_adapter("phi3", tmp_path / "a", target_modules=["qkv_proj"])
    with pytest.raises(StoreError, match=r"another model \(.*changes .*qkv_proj, which this one"):
        check(llama, path)


def test_a_rank_above_the_slots_is_refused(llama: Case) -> None:
    with pytest.raises(StoreError, match=r"rank 5 in .* start with --adapter-rank 5"):
        check(llama, llama.paths[4], rank=4)


def test_routed_experts_are_refused_by_name(tmp_path: Path) -> None:
    """As PEFT named them where they were modules."""
    store = tiny_store("mixtral", tmp_path)
    path = save_adapter("mixtral", tmp_path / "a")
    plan = manual_plan(Store.open(store), adapter_slots=1)
    with local_ring(store, plan) as ring:
        ring.check_adapter(open_adapter(path).adapter)
        tensors = load_file(path / WEIGHTS)
        start = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w1.lora_"
        tensors |= {f"{start}A.weight": torch.zeros(8, 64), f"{start}B.weight": torch.zeros(96, 8)}
        save_file(tensors, path / WEIGHTS)
        with pytest.raises(StoreError, match=r"experts\.1\.w1, a routed expert"):
            ring.check_adapter(open_adapter(path).adapter)


SETTINGS = {
    "use_dora": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": [1],
    "peft_type": "IA3",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_not_plain_lora_is_refused_by_name(
    llama: Case, tmp_path: Path, setting: str
) -> None:
    copy = shutil.copytree(llama.paths[0], tmp_path / "a")
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: SETTINGS[setting]}))
    with pytest.raises(StoreError, match="IA3" if setting == "peft_type" else setting):
        open_adapter(copy)


def test_directories_that_are_no_adapters(llama: Case, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is no directory"):
        open_adapter(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="File name too long"):
        open_adapter(Path("0" * 4096))
    with pytest.raises(StoreError, match=r"has no adapter_config\.json"):
        open_adapter(tmp_path)
    copy = shutil.copytree(llama.paths[0], tmp_path / "a")
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="cannot be read"):
        open_adapter(copy)
    (copy / WEIGHTS).unlink()
    with pytest.raises(StoreError, match="save it as safetensors"):
        open_adapter(copy)


def test_an_embedding_is_refused(tmp_path: Path) -> None:
    path = save_adapter("llama", tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(StoreError, match="lora_embedding"):
        open_adapter(path)


def test_files_that_changed_are_not_taken_for_what_they_were(llama: Case, tmp_path: Path) -> None:
    copy = shutil.copytree(llama.paths[0], tmp_path / "a")
    before = open_adapter(copy).adapter
    shutil.copy(llama.paths[3] / WEIGHTS, copy)
    shutil.copy(llama.paths[3] / "adapter_config.json", copy)
    plan = manual_plan(Store.open(llama.store), adapter_slots=1)
    with (
        local_ring(llama.store, plan) as ring,
        pytest.raises(StoreError, match="have changed since it was named: unload it"),
    ):
        ring.check_adapter(before)
