"""Plans that the planner makes of split layers, run: the tokens are transformers', the bytes the plan's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import greedy, tiny_model
from plan_checks import check
from rings import local_ring, run_all

from headrace.runtime.conversion.convert import convert
from headrace.runtime.shape import model_shape
from headrace.runtime.store import Store
from headrace.scheduler.inputs import Budget, Choices, DeviceProfile, Workload
from headrace.scheduler.placement import Plan
from headrace.scheduler.planner import make_plan
from headrace.scheduler.request import Request, SamplingParams

CPU = DeviceProfile("cpu", 1.5, 8.0, 0.05, 20.0, 3e-4, 4.8)
LENGTHS = (1, 9, 20, 66)
NEW_TOKENS = 8

ARCHITECTURES = ("mixtral", "qwen3_moe", "deepseek_v3")

WISHES: dict[str, dict[str, Any]] = {
    "nothing stays": {"resident_layers": 0, "micro_batches": 1},
    "dense parts stay": {"resident_layers": 2, "micro_batches": 1},
    "several micro-batches": {"resident_layers": 1, "micro_batches": 3},
    "two stages in turn": {"resident_layers": 0, "placement": "cyclic"},
}


class Made:
    """A tiny model's store, and what transformers answers to prompts."""

    def __init__(self, name: str, folder: Path) -> None:
        model = tiny_model(name)
        model.save_pretrained(folder / "checkpoint")
        self.path = folder / "store"
        convert(folder / "checkpoint", self.path, format="keep", allow_missing_tokenizer=True)
        generator = torch.Generator().manual_seed(7)
        self.prompts = [torch.randint(3, 256, (n,), generator=generator).tolist() for n in LENGTHS]
        self.greedy = {i: greedy(model, p, NEW_TOKENS) for i, p in enumerate(self.prompts)}

    def plan(self, stages: int, host: int, wishes: dict[str, Any]) -> Plan:
        shape = model_shape(Store.open(self.path), "float32")
        budgets = [Budget(100 << 20, host)] * stages
        workload = Workload(128, len(LENGTHS), min_sequences=len(LENGTHS))
        plan = make_plan(shape, [CPU] * stages, budgets, workload, Choices(**wishes))
        check(plan, shape, budgets)
        return plan


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("host", [0, 64 << 10, 10 << 20])
@pytest.mark.parametrize("wish", WISHES)
def test_tokens_are_those_of_the_whole_model(made: Made, wish: str, host: int) -> None:
    plan = made.plan(2 if "stages" in wish else 1, host, WISHES[wish])
    assert any(plan.expert_slots)
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    requests = [Request(i, list(p), params, seed=i) for i, p in enumerate(made.prompts)]
    with local_ring(made.path, plan) as pipeline:
        assert run_all(plan, pipeline, requests) == made.greedy
