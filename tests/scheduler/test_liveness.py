"""Whatever comes, every request ends with exactly its tokens and every page returns."""

import logging
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace

import pytest
from guessable import VOCABULARY, draw, next_token
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.scheduler.config import DraftLimits, SchedulerConfig
from headrace.scheduler.pages import pages_for
from headrace.scheduler.plan import FOLLOWS, PAGE_TOKENS, Pass, Sample, Slice
from headrace.scheduler.request import FinishReason, Priority, Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler


@dataclass
class FakePipeline:
    """Keeps KV pages as stages do, and reads a request's context from nowhere else."""

    config: SchedulerConfig
    pages: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    tails: dict[int, dict[int, tuple[int, int]]] = field(default_factory=dict)
    in_flight: deque[tuple[Pass, list[Sample]]] = field(default_factory=deque)
    drawn: dict[int, dict[int, int]] = field(default_factory=dict)
    steps: int = 0
    followers: int = 0
    drafts: int = 0

    def submit(self, a_pass: Pass) -> None:
        assert a_pass.step == self.steps + 1
        self.steps += 1
        self.check(a_pass)
        pieces = [piece for batch in a_pass.micro_batches for piece in batch.slices]
        known = [self.resolve(piece, a_pass.follows) for piece in pieces]
        samples = [sample for piece in known for sample in self.compute(piece)]
        self.drawn[a_pass.step] = {sample.request: sample.token for sample in samples}
        self.in_flight.append((a_pass, samples))

    def resolve(self, piece: Slice, follows: int | None) -> Slice:
        """The slice with the token that it follows."""
        if FOLLOWS not in piece.tokens:
            return piece
        assert len(piece.tokens) == 1 and follows is not None
        self.followers += 1
        return piece._replace(tokens=(self.drawn[follows][piece.request],))

    def check(self, a_pass: Pass) -> None:
        config, batches = self.config, a_pass.micro_batches
        pieces = [piece for batch in batches for piece in batch.slices]
        flying = [p for a, _ in self.in_flight for b in a.micro_batches for p in b.slices]
        oldest = self.in_flight[0][0] if config.ahead and self.in_flight else None
        before = {p.request for b in oldest.micro_batches for p in b.slices} if oldest else set()
        requests = requests_of(a_pass)
        again = requests & {piece.request for piece in flying}
        check_parts(a_pass, config)
        assert again <= before, "a request twice in flight"
        twice = Counter(requests)
        for flies, _ in self.in_flight:
            twice.update(requests_of(flies))
        assert max(twice.values()) <= 1 + config.ahead
        assert a_pass.follows in (None, oldest.step if oldest else None)
        held = {(page, piece.request) for piece in pieces + flying for page in piece.pages}
        assert len(held) == len({page for page, _ in held}), "a page shared by two requests"
        tails = {(piece.tail, piece.request) for piece in pieces + flying}
        assert len(tails) == len({tail for tail, _ in tails}), "a tail shared by two requests"
        assert all(tail < (config.num_tails or config.num_pages) for tail, _ in tails)
        assert 0 < a_pass.num_tokens <= config.token_budget
        assert len(requests) <= config.max_sequences
        assert len(batches) == min(len(pieces), config.micro_batches)
        assert all(0 < batch.num_tokens <= config.micro_batch_tokens for batch in batches)

    def compute(self, piece: Slice) -> list[Sample]:
        """As a stage does that quantizes pages, where there are tails: the newest page is nowhere but there."""
        assert piece.tokens
        self.drafts += piece.num_drafts
        assert len(piece.pages) == pages_for(piece.end)
        before, first = piece.start // PAGE_TOKENS, piece.start % PAGE_TOKENS
        tail = self.tails.setdefault(piece.tail, {})
        past = [entry for page in piece.pages[:before] for entry in self.pages[page]]
        origin = 0 if self.config.num_tails else before * PAGE_TOKENS
        past += [tail[origin + at] for at in range(first)]
        assert all(owner == piece.request for owner, _ in past), "keys were overwritten"
        known = past + [(piece.request, token) for token in piece.tokens]
        full = piece.end // PAGE_TOKENS
        for number in range(before, full):
            page = known[number * PAGE_TOKENS : (number + 1) * PAGE_TOKENS]
            self.pages[piece.pages[number]] = page
        if self.config.num_tails:
            tail.update(enumerate(known[full * PAGE_TOKENS :]))
        else:
            tail.update(enumerate(known[piece.start :], piece.start))
        return draw(piece, [token for _, token in known])


def requests_of(a_pass: Pass) -> set[int]:
    return {piece.request for batch in a_pass.micro_batches for piece in batch.slices}


def check_parts(a_pass: Pass, config: SchedulerConfig) -> None:
    """Of a request there is one slice, or parts that follow one another in micro-batches that do."""
    ends = dict[int, int]()
    for batch in a_pass.micro_batches:
        requests = [piece.request for piece in batch.slices]
        assert len(requests) == len(set(requests)), "a request twice in a micro-batch"
        for piece in batch.slices:
            assert config.least_part or piece.request not in ends
            assert piece.start == ends.get(piece.request, piece.start), "parts out of order"
            ends[piece.request] = piece.end


def alone(request: Request, max_context: int) -> tuple[list[int], FinishReason]:
    """The output of a request that has the pipeline to itself."""
    tokens = list(request.tokens)
    limit = min(len(tokens) + request.params.max_tokens, max_context)
    while len(tokens) < limit:
        tokens.append(next_token(tokens))
        if tokens[-1] in request.stop_ids:
            return tokens[request.num_prompt :], FinishReason.STOP
    return tokens[request.num_prompt :], FinishReason.LENGTH


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    num_pages = draw(st.sampled_from([6, 5, 4, 3, 2, 1]))
    full = num_pages * PAGE_TOKENS + 1
    return SchedulerConfig(
        num_pages=num_pages,
        max_context=draw(st.sampled_from([full, full, full - 20, min(50, full), 2])),
        token_budget=draw(st.sampled_from([300, 100, 64, 20, 5, 1])),
        max_sequences=draw(st.sampled_from([8, 6, 4, 2, 1])),
        micro_batches=draw(st.integers(1, 4)),
        micro_batch_tokens=draw(st.sampled_from([100, 64, 30, 7, 1])),
        passes_in_flight=draw(st.integers(1, 3)),
        ahead=draw(st.integers(0, 1)),
        num_tails=draw(st.sampled_from([0, 4, 2, 1])),
        drafts=draw(st.sampled_from([DraftLimits(), *SPECULATING])),
        least_part=draw(st.sampled_from([0, 64, 10, 1])),
    )


SPECULATING = [
    DraftLimits(most=8, most_tokens=10_000),
    DraftLimits(most=3, most_tokens=12, least_gain=0.3),
    DraftLimits(most=20, most_tokens=10_000, least_tokens=2),
]


def make_requests(count: int, max_context: int, rng: random.Random) -> list[Request]:
    """Sizes come from `rng`: hypothesis likes them small and alike, which hardly ever preempts."""
    requests = []
    for i in range(count):
        # Prompts that end shortly before a page does ask for another page soon.
        prompt = rng.choice([rng.randint(1, 200), 40, 60, 63, 64, 65, 127])
        tokens = [rng.randrange(VOCABULARY) for _ in range(min(prompt, max_context - 1))]
        params = SamplingParams(max_tokens=rng.randint(1, 130))
        stop_ids = frozenset({3}) if rng.random() < 0.2 else frozenset[int]()
        requests.append(Request(i, tokens, params, seed=i, stop_ids=stop_ids))
    return requests


def share_out(requests: list[Request], rng: random.Random) -> list[Request]:
    """The same of several owners, some of them batch."""
    return [
        replace(
            request,
            priority=rng.choice([*Priority]),
            tenant=rng.choice(["ann", "bob", "cid"]),
            weight=rng.choice([1, 1, 5]),
        )
        for request in requests
    ]


class Driver:
    """An engine loop that adds, finishes and aborts at random; remembers what was promised."""

    def __init__(self, config: SchedulerConfig, depth: int, rng: random.Random) -> None:
        self.scheduler = Scheduler(config)
        self.pipeline = FakePipeline(config)
        self.depth, self.rng = depth, rng
        self.live: dict[int, Request] = {}
        self.cut: dict[int, tuple[list[int], FinishReason]] = {}
        self.ended: list[Request] = []
        self.outputs: dict[int, list[int]] = {}

    def run(self, requests: list[Request], interference: float) -> None:
        queue = deque(requests)
        while queue or self.scheduler.has_work:
            while queue and self.rng.random() < 0.5:
                self.add(queue.popleft())
            if self.live and self.rng.random() < interference:
                self.interfere(self.rng.choice(list(self.live.values())))
            self.fill()
            if self.pipeline.in_flight:
                self.collect()
            self.check()

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.live[request.request_id] = request
        self.outputs[request.request_id] = []

    def interfere(self, request: Request) -> None:
        if self.rng.random() < 0.5:
            count, reason = self.rng.randint(0, request.num_output), FinishReason.STOP
            ended = self.scheduler.finish(request.request_id, reason, count)
        else:
            count, reason = request.num_output, FinishReason.ABORT
            ended = self.scheduler.abort(request.request_id)
        assert ended is request
        self.cut[request.request_id] = (self.outputs[request.request_id][:count], reason)
        del self.live[request.request_id]
        self.ended.append(request)

    def fill(self) -> None:
        while len(self.pipeline.in_flight) < self.depth:
            a_pass = self.scheduler.schedule()
            if a_pass is None:
                assert self.pipeline.in_flight or not self.live
                return
            self.pipeline.submit(a_pass)

    def collect(self) -> None:
        update = self.scheduler.update(*self.pipeline.in_flight.popleft())
        for request, sample in update.committed:
            assert request.request_id in self.live, "a token after the end"
            self.outputs[request.request_id].append(sample.token)
        for request in update.finished:
            del self.live[request.request_id]
            self.ended.append(request)

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.pool.check_integrity()
        scheduler.tails.check_integrity()
        assert scheduler.num_waiting + scheduler.num_running == len(self.live)
        pages = [page for request in self.live.values() for page in request.pages]
        assert len(pages) == len(set(pages)), "a page with two owners"
        for request in self.live.values():
            assert (request.tail is None) == (not request.pages)
            assert request.output == self.outputs[request.request_id]
            assert request.num_pending > 0


def check_promises(driver: Driver, requests: list[Request], interference: float) -> None:
    config = driver.scheduler.config
    expected = {request.request_id: alone(request, config.max_context) for request in requests}
    driver.run(requests, interference)
    assert sorted(request.request_id for request in driver.ended) == sorted(expected)
    for request in driver.ended:
        promised = driver.cut.get(request.request_id, expected[request.request_id])
        assert (request.output, request.finish_reason) == promised
        assert request.pages == []
    driver.scheduler.pool.check_integrity()
    assert driver.scheduler.pool.num_free == config.num_pages
    driver.scheduler.tails.check_integrity()
    assert driver.scheduler.tails.num_free == (config.num_tails or config.num_pages)


@settings(max_examples=150, deadline=None, database=None)
@given(
    config=configs(),
    count=st.sampled_from([12, 10, 8, 6, 3, 1, 0]),
    depth=st.integers(1, 4),
    interference=st.sampled_from([0.0, 0.01, 0.1]),
    is_mixed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_request_ends_with_exactly_its_tokens(
    config: SchedulerConfig,
    count: int,
    depth: int,
    interference: float,
    is_mixed: bool,
    seed: int,
) -> None:
    rng = random.Random(seed)
    requests = make_requests(count, config.max_context, rng)
    if is_mixed:
        requests = share_out(requests, rng)
    check_promises(Driver(config, depth, rng), requests, interference)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("interference", "num_tails"), [(0.0, 0), (0.02, 4)])
@pytest.mark.parametrize("speculating", [False, True])
@pytest.mark.parametrize(
    "seeds", [range(3), pytest.param(range(3, 12), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_scarce_pages_cost_preemptions_but_no_tokens(
    depth: int, interference: float, num_tails: int, ahead: int, speculating: bool, seeds: range
) -> None:
    config = SchedulerConfig(
        num_pages=6,
        max_context=6 * PAGE_TOKENS,
        token_budget=128,
        max_sequences=4,
        micro_batches=2,
        micro_batch_tokens=64,
        ahead=ahead,
        num_tails=num_tails,
        drafts=SPECULATING[0] if speculating else DraftLimits(),
    )
    preemptions = followers = drafts = accepted = 0
    for seed in seeds:
        rng = random.Random(seed)
        driver = Driver(config, depth, rng)
        check_promises(driver, make_requests(10, config.max_context, rng), interference)
        preemptions += driver.scheduler.num_preemptions
        followers += driver.pipeline.followers
        drafts += driver.pipeline.drafts
        accepted += driver.scheduler.speculation.counts.accepted
    assert preemptions > 0
    assert (followers > 0) == (ahead > 0 and depth > 1)
    assert (drafts > 0) == speculating
    assert not speculating or accepted > 0.1 * drafts


def test_a_pass_costs_what_runs_not_what_waits() -> None:
    """5,000 requests, 256 of them running: the decision stays far below a pass's own time."""
    config = SchedulerConfig(
        num_pages=4096,
        max_context=2048,
        token_budget=4096,
        max_sequences=256,
        micro_batches=8,
        micro_batch_tokens=1024,
    )
    scheduler, rng = Scheduler(config), random.Random(0)
    for i in range(5000):
        params = SamplingParams(max_tokens=rng.randint(1, 24))
        scheduler.add(Request(i, [1] * rng.randint(1, 400), params, seed=i))
    passes, finished, started = 0, 0, time.perf_counter()
    while scheduler.has_work:
        a_pass = scheduler.schedule()
        assert a_pass is not None
        pieces = [p for b in a_pass.micro_batches for p in b.slices if p.sampling is not None]
        update = scheduler.update(a_pass, [Sample(p.request, 2, None, ()) for p in pieces])
        finished += len(update.finished)
        passes += 1
    cost = (time.perf_counter() - started) / passes
    logging.getLogger(__name__).info("%d passes, %.2f ms each", passes, cost * 1e3)
    assert finished == 5000
    assert scheduler.pool.num_free == config.num_pages
