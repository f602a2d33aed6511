"""Shared prefixes and pages in tiers, from the engine's side."""

import random
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from fake_tiers import FakeTiers
from rings import local_ring, manual_plan

from headrace.cluster.engine import Engine
from headrace.cluster.pass_bound import least_seconds
from headrace.cluster.pipeline import Pending
from headrace.cluster.ring import Ring
from headrace.cluster.tokenizer import load_tokenizer
from headrace.runtime.store import Store
from headrace.scheduler.placement import Plan, Tier
from headrace.scheduler.plan import PAGE_TOKENS, Pass, PassResult, Sample
from headrace.scheduler.request import SamplingParams

STORY = "The old man had a boat and a dog. One day, there was a big storm and Tom said: "
ENDS = ["Hello", "I see a cat", "The sun", "My dog", "Look"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@dataclass
class Counting:
    """A pipeline that counts what it is given."""

    pipeline: object
    num_tokens: int = 0
    passes: list[Pass] = field(default_factory=list)

    def submit(self, a_pass: Pass) -> Pending:
        self.num_tokens += a_pass.num_tokens
        self.passes.append(a_pass)
        return self.pipeline.submit(a_pass)  # type: ignore[attr-defined, no-any-return]

    def close(self) -> None:
        pass


def serve(store: Path, plan: Plan, *, alone: bool) -> tuple[dict[int, list[int]], int, Engine]:
    """Answers, tokens computed, and the engine. Each request is a tenant `alone`, or all are one."""
    tokenizer = load_tokenizer(store)
    with local_ring(store, plan) as ring:
        counting = Counting(ring)
        engine = Engine(
            Ring(plan, counting), tokenizer, stop_ids=frozenset(), digest="d", dtype="float32"
        )
        for i, end in enumerate(ENDS):
            tokens = tokenizer(8 * STORY + end)["input_ids"]
            engine.add(tokens, GREEDY, seed=i, tenant=f"tenant {i}" if alone else "")
        answers = {}
        while engine.has_work:
            answers |= {done.request_id: done.token_ids for done in engine.step()}
    return answers, counting.num_tokens, engine


@pytest.mark.parametrize(
    ("kv_format", "ahead"), [pytest.param("fp32", 0, marks=pytest.mark.slow), ("int8", 1)]
)
def test_a_shared_prefix_is_computed_once_and_changes_no_token(
    stories: Path, kv_format: str, ahead: int
) -> None:
    plan = manual_plan(
        Store.open(stories),
        stages=2,
        tier=Tier.DEVICE,
        max_sequences=2,
        token_budget=150,
        ahead=ahead,
        kv_format=kv_format,
    )
    answers, computed, engine = serve(stories, plan, alone=True)
    assert engine.stats.kv.hits.total == 0
    shared, fewer, engine = serve(stories, plan, alone=False)
    assert shared == answers
    saved = engine.stats.kv.hits.tokens.device
    assert saved >= 3 * 2 * PAGE_TOKENS
    assert fewer == computed - saved


@dataclass
class FakePending:
    results: list[PassResult]

    def result(self) -> list[PassResult]:
        return self.results


class TieredPipeline:
    """Two stages that draw any token, and move pages when they please."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tiers = FakeTiers(self.rng)
        self.passes: deque[Pass] = deque()

    def submit(self, a_pass: Pass) -> Pending:
        self.passes.append(a_pass)
        pieces = [piece for batch in a_pass.micro_batches for piece in batch.slices]
        for piece in pieces:
            for page in piece.pages:
                if page not in self.tiers.stages[0].device:
                    self.tiers.write(page, ())
        self.tiers.start(a_pass.moves)
        samples = tuple(
            Sample(piece.request, self.rng.randrange(3, 200), None, ())
            for piece in pieces
            if piece.sampling is not None
        )
        first, last = self.tiers.report(a_pass.step, everything=not pieces)
        return FakePending([first, replace(last, samples=samples)])

    def close(self) -> None:
        pass


@pytest.mark.parametrize("ahead", [0, 1])
def test_passes_that_only_wait_for_moves_go_round_as_others_do(stories: Path, ahead: int) -> None:
    store = Store.open(stories)
    plan = replace(
        manual_plan(store, stages=2, num_pages=7, ahead=ahead, token_budget=400), host_pages=8
    )
    pipeline, rng = TieredPipeline(3), random.Random(5)
    engine = Engine(
        Ring(plan, pipeline),
        load_tokenizer(stories),
        stop_ids=frozenset(),
        digest="",
        dtype="float32",
    )
    params = SamplingParams(max_tokens=150, ignore_eos=True)
    for i in range(6):
        engine.add([rng.randrange(3, 200) for _ in range(190)], params, seed=i)
    done = []
    while engine.has_work:
        done += engine.step()
    assert sorted(completion.request_id for completion in done) == list(range(6))
    assert all(len(completion.token_ids) == 150 for completion in done)
    empty = [a_pass for a_pass in pipeline.passes if not a_pass.micro_batches]
    assert empty
    assert engine.stats.passes == len(pipeline.passes) - len(empty)
    kv = engine.stats.kv
    assert kv.preempted_by_swap > 0 and kv.hits.host > 0
    assert kv.device.total == 7 and kv.host.total == 8


def test_a_pass_of_moves_alone_is_bound_by_nothing_in_the_plan(stories: Path) -> None:
    plan = manual_plan(Store.open(stories))
    assert least_seconds(plan, 0) == 0.0 < least_seconds(plan, 1)
