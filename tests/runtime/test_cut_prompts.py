"""Prompts in parts, in several micro-batches of a pass: answers are those of prompts that are whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from rings import local_ring, manual_plan, run_all

from headrace.runtime.conversion.convert import convert
from headrace.runtime.store import Store
from headrace.scheduler.limits import limits_of
from headrace.scheduler.placement import Tier
from headrace.scheduler.plan import Pass
from headrace.scheduler.request import Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler

LENGTHS = (3, 300, 64, 150, 5, 190)
WHOLE: dict[str, Any] = {"stages": 1, "tier": Tier.DEVICE}
CUT: list[dict[str, Any]] = [
    {"stages": 2, "cyclic": True, "micro_batches": 4},
    {"stages": 3, "cyclic": True, "ahead": 1, "token_budget": 900},
    {"stages": 2, "tier": Tier.DEVICE, "micro_batches": 3, "num_pages": 9},
]


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Global attention; windows of 8 beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "store", format="keep", allow_missing_tokenizer=True)
    return folder / "store"


class Watched(Scheduler):
    """Counts passes in which a request is in several micro-batches."""

    cut = 0

    def schedule(self) -> Pass | None:
        a_pass = super().schedule()
        if a_pass is not None:
            requests = [p.request for batch in a_pass.micro_batches for p in batch.slices]
            self.cut += len(set(requests)) < len(requests)
        return a_pass


def serve(store: Path, ring: dict[str, Any], kv_format: str) -> tuple[dict[int, list[int]], int]:
    """Outputs by request, half of them sampled, and how many passes had prompts in parts."""
    generator = torch.Generator().manual_seed(7)
    params = [SamplingParams(temperature=t, max_tokens=20) for t in (0.0, 0.8)]
    requests = [
        Request(i, torch.randint(3, 250, (n,), generator=generator).tolist(), params[i % 2], i)
        for i, n in enumerate(LENGTHS)
    ]
    plan = manual_plan(Store.open(store), kv_format=kv_format, **ring)
    scheduler = Watched(limits_of(plan))
    with local_ring(store, plan) as pipeline:
        return run_all(plan, pipeline, requests, scheduler), scheduler.cut


def test_prompts_are_cut_for_convoys_that_load_whole_layers(store: Path) -> None:
    plan = manual_plan(Store.open(store), stages=2, cyclic=True)
    assert limits_of(plan).least_part == 64
    for other in ({"expert_slots": (8, 8)}, {"passes_in_flight": 2}):
        assert limits_of(replace(plan, **other)).least_part == 0
    assert limits_of(manual_plan(Store.open(store), micro_batches=4)).least_part == 0


@pytest.mark.parametrize("kv_format", ["int8", pytest.param("fp32", marks=pytest.mark.slow)])
def test_prompts_in_parts_are_answered_as_whole_ones(store: Path, kv_format: str) -> None:
    want, none = serve(store, WHOLE, kv_format)
    assert none == 0
    for ring in CUT:
        found, cut = serve(store, ring, kv_format)
        assert cut > 0, ring
        assert found == want, ring
