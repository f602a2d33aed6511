"""A pass ahead never changes an answer, whatever ends a request and wherever its token is drawn."""

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from local_engines import engine_of

from headrace import LLM
from headrace.cluster.completion import Completion
from headrace.cluster.engine import Engine
from headrace.runtime.store import Store
from headrace.scheduler.errors import StoreError
from headrace.scheduler.placement import Tier
from headrace.scheduler.request import SamplingParams

STORY = "The old man had a boat and a dog. One day, there was a big storm and Tom said: "
ROWS = 15
RINGS: list[dict[str, Any]] = [
    {"stages": 1, "tier": Tier.DEVICE},
    {"stages": 1, "tier": Tier.NVME, "token_budget": 80, "num_pages": 6},
    {"stages": 2, "tier": Tier.DEVICE, "token_budget": 40, "passes_in_flight": 2},
    {"stages": 2, "tier": Tier.NVME, "cyclic": True, "num_pages": 6},
]
"""Passes that hold everything, chunks of prompts, pages that run short, and two groups."""


def wishes() -> list[SamplingParams]:
    """Greedy and sampled; ended by length, by a token and by a string; penalties and logprobs."""
    chance = random.Random(3)
    return [
        SamplingParams(
            max_tokens=chance.choice([1, 2, 20, 30, 40]),
            temperature=chance.choice([0.0, 0.9]),
            top_p=chance.choice([1.0, 0.9]),
            repetition_penalty=chance.choice([1.0, 1.3]),
            frequency_penalty=chance.choice([0.0, 0.5]),
            stop=chance.choice([(), (), ("big",), ("little", ".")]),
            stop_token_ids=chance.choice([(), (), tuple(range(3, 300, 40))]),
            logprobs=chance.choice([None, 2]),
        )
        for _ in range(ROWS)
    ]


def serve(engine: Engine) -> dict[int, Completion]:
    """All completions of an engine, in which every fifth request is given up half-way."""
    story = engine.tokenizer(4 * STORY)["input_ids"]
    done: dict[int, Completion] = {}
    for i, params in enumerate(wishes()):
        length = 90 if i % 6 == 0 else 54 + i % 7  # most need a second page soon
        engine.add(story[:length], params, seed=i)
    given_up = set(range(0, ROWS, 5))
    while engine.has_work:
        done |= {completion.request_id: completion for completion in engine.step()}
        for request_id in [i for i in given_up if engine.has_started(i)]:
            given_up.discard(request_id)
            engine.abort(request_id)
    return {i: completion for i, completion in done.items() if i % 5}


@pytest.fixture(scope="module")
def alone(stories: Path) -> dict[int, Completion]:
    """What a ring without a pass ahead answers."""
    with engine_of(stories, {"stages": 1, "tier": Tier.DEVICE}) as engine:
        return serve(engine)


def test_the_requests_end_in_every_way(alone: dict[int, Completion]) -> None:
    assert len(alone) == ROWS * 4 // 5
    assert {completion.finish_reason for completion in alone.values()} == {"stop", "length"}


@pytest.mark.parametrize("ring", RINGS)
def test_answers_are_those_of_passes_that_wait(
    ring: dict[str, Any], alone: dict[int, Completion], stories: Path
) -> None:
    with engine_of(stories, ring | {"ahead": 1}) as engine:
        check_alike(serve(engine), alone)
    assert (engine._scheduler.num_preemptions > 0) == ("num_pages" in ring)


@pytest.mark.parametrize(
    ("placement", "resident", "passes"),
    [("contiguous", None, 2), ("cyclic", 0, 1)],
)
@pytest.mark.slow
def test_tokens_go_from_the_stage_that_draws_to_the_one_that_embeds(
    alone: dict[int, Completion],
    stories: Path,
    tmp_path: Path,
    ray_here: None,
    placement: str,
    resident: int | None,
    passes: int,
) -> None:
    store = Path(shutil.copytree(stories, tmp_path / "copy.nf4"))
    room: dict[str, Any] = {"device": "cpu", "host_memory": 0, "context": 256}
    room |= {"placement": placement, "resident_layers": resident, "device_memory": "64MiB"}
    with LLM(store, stages=2, **room) as llm:
        plan = llm.plan
        assert (plan.passes_in_flight, plan.ahead) == (passes, 1)
        assert plan.placement.first_stage != plan.placement.last_stage
        check_alike(serve(llm._engine), alone)
        if resident is None:
            return
        # A pass that fails is named by its cause, whatever becomes of those that follow it.
        layer = Store.open(store).layers[-1].file
        os.truncate(layer, layer.stat().st_size // 2)
        with pytest.raises(StoreError, match="layer-00011"):
            serve(llm._engine)


def check_alike(found: dict[int, Completion], wanted: dict[int, Completion]) -> None:
    """Equal, but for the last digits of logprobs: sums depend on what shares a matmul."""
    assert found.keys() == wanted.keys()
    for i, completion in wanted.items():
        assert _rounded(found[i]) == _rounded(completion)


def _rounded(completion: Completion) -> Completion:
    noted = [
        sample._replace(logprob=None, top=tuple((token, 0.0) for token, _ in sample.top))
        for sample in completion.logprobs or ()
    ]
    # What is found in caches depends on who was there first.
    return replace(completion, logprobs=noted, num_cached=0)
