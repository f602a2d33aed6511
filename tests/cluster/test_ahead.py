"""A pass ahead never changes an answer, whatever ends a request and wherever its token is drawn."""

import random
from pathlib import Path
from typing import Any

import pytest
from rings import local_ring, manual_plan

from headrace.cluster.completion import Completion
from headrace.cluster.engine import Engine
from headrace.cluster.tokenizer import load_tokenizer
from headrace.runtime.store import Store
from headrace.scheduler.placement import Tier
from headrace.scheduler.request import SamplingParams

STORY = "The old man had a boat and a dog. One day, there was a big storm and Tom said: "
ROWS = 20
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


def serve(store: Path, ring: dict[str, Any]) -> tuple[dict[int, Completion], Engine]:
    """All completions of a ring on the bundled model. Every fifth request is given up half-way."""
    tokenizer, plan = load_tokenizer(store), manual_plan(Store.open(store), **ring)
    story = tokenizer(4 * STORY)["input_ids"]
    done: dict[int, Completion] = {}
    with (
        local_ring(store, plan) as pipeline,
        Engine(plan, pipeline, tokenizer, stop_ids=frozenset({2}), digest="") as engine,
    ):
        for i, params in enumerate(wishes()):
            length = 90 if i % 6 == 0 else 54 + i % 7  # most need a second page soon
            engine.add(story[:length], params, seed=i)
        given_up = set(range(0, ROWS, 5))
        while engine.has_work:
            done |= {completion.request_id: completion for completion in engine.step()}
            for request_id in [i for i in given_up if engine.has_started(i)]:
                given_up.discard(request_id)
                engine.abort(request_id)
    return {i: c for i, c in done.items() if i % 5}, engine


@pytest.fixture(scope="module")
def alone(stories: Path) -> dict[int, Completion]:
    """What a ring without a pass ahead answers."""
    return serve(stories, {"stages": 1, "tier": Tier.DEVICE})[0]


def test_the_requests_end_in_every_way(alone: dict[int, Completion]) -> None:
    assert len(alone) == ROWS * 4 // 5
    assert {completion.finish_reason for completion in alone.values()} == {"stop", "length"}


@pytest.mark.parametrize("ring", RINGS)
def test_answers_are_those_of_passes_that_wait(
    ring: dict[str, Any], alone: dict[int, Completion], stories: Path
) -> None:
    found, engine = serve(stories, ring | {"ahead": 1})
    for i, completion in alone.items():
        check_alike(found[i], completion)
    assert found.keys() == alone.keys()
    assert (engine._scheduler.num_preemptions > 0) == ("num_pages" in ring)


def check_alike(found: Completion, wanted: Completion) -> None:
    """Equal, but for the last digits of logprobs: sums depend on what shares a matmul."""
    for name in ("request_id", "token_ids", "text", "finish_reason", "num_prompt"):
        assert getattr(found, name) == getattr(wanted, name), (name, wanted)
    for a, b in zip(found.logprobs or (), wanted.logprobs or (), strict=True):
        assert (a.token, [token for token, _ in a.top]) == (b.token, [t for t, _ in b.top])
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
