"""Forecasts, against the real scheduler on a clock that is moved by hand."""

import math
import random
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from headrace.cluster.completion import Completion
from headrace.cluster.serving.admission import Admission, Promise
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.generation import Generation, Order
from headrace.cluster.serving.pass_model import PassModel
from headrace.cluster.serving.terms import Terms
from headrace.scheduler.config import DraftLimits, SchedulerConfig
from headrace.scheduler.plan import Pass, Sample, Slice
from headrace.scheduler.request import Priority, Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler

LIMITS = SchedulerConfig(
    num_pages=60,
    max_context=512,
    token_budget=256,
    max_sequences=16,
    micro_batches=1,
    micro_batch_tokens=256,
    ahead=1,
)


@dataclass
class Asked:
    generation: Generation
    came: float
    first: float | None = None
    done: float | None = None
    forecast: float = 0.0


@dataclass
class Simulated:
    """A server of which only the stages and the clock are not real: a pass takes 20 ms and 0.1 ms a token."""

    limits: SchedulerConfig
    rng: random.Random
    noise: float = 0.0
    now: float = 0.0
    model: PassModel = field(default_factory=PassModel)
    refused: list[ApiError] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler, self.admission = Scheduler(self.limits), Admission(self.limits)
        self.asked: dict[int, Asked] = {}
        self.ended: list[Asked] = []
        self.fresh: deque[tuple[int, Asked]] = deque()
        self.in_flight: deque[Pass] = deque()
        self.numbers = 0

    def ask(self, order: Order, terms: Terms) -> Asked | None:
        """As AsyncEngine does it."""
        try:
            promise = self.admission.promise([order], terms, self.model.pace, self.now)
        except ApiError as error:
            self.refused.append(error)
            return None
        generation = Generation([order], terms)
        self.admission.enter(generation, promise)
        made = Asked(
            generation, self.now, forecast=promise.forecast.first if promise.forecast else 0
        )
        self.numbers += 1
        self.fresh.append((self.numbers, made))
        self.asked[self.numbers] = made
        return made

    def run(self, arrivals: list[tuple[float, Order, Terms]], until: float) -> None:
        """Passes, one after the other, until all is done or the time is over."""
        left = deque(arrivals)
        while self.now < until and (left or self.asked):
            if not self.asked:
                self.now = max(self.now, left[0][0])
            self.arrive(left, self.now)
            while self.fresh:
                number, made = self.fresh.popleft()
                self.add(number, made.generation)
            while len(self.in_flight) < self.limits.passes_in_flight + self.limits.ahead:
                a_pass = self.scheduler.schedule()
                if a_pass is None:
                    break
                self.in_flight.append(a_pass)
            if not self.in_flight:
                continue
            a_pass = self.in_flight.popleft()
            seconds = 0.02 + 1e-4 * a_pass.num_tokens
            seconds *= self.rng.lognormvariate(0.0, self.noise)
            self.arrive(left, self.now + seconds)
            self.model.observe(a_pass.num_tokens, seconds)
            self.collect(a_pass)

    def arrive(self, left: deque[tuple[float, Order, Terms]], until: float) -> None:
        while left and left[0][0] <= until:
            at, order, terms = left.popleft()
            self.now = max(self.now, at)
            self.ask(order, terms)
        self.now = until

    def add(self, number: int, generation: Generation) -> None:
        [order], terms = generation.orders, generation.terms
        tokens, params = list(order.token_ids), order.params
        request = Request(number, tokens, params, 0, frozenset(), order.tenant, False)
        self.scheduler.add(replace(request, priority=terms.priority, weight=terms.weight))

    def collect(self, a_pass: Pass) -> None:
        pieces: list[Slice] = [p for b in a_pass.micro_batches for p in b.slices]
        drawing = [piece for piece in pieces if piece.sampling is not None]
        samples = [Sample(piece.request, 2, None, ()) for piece in drawing]
        update = self.scheduler.update(a_pass, samples)
        done = {request.request_id for request in update.finished}
        for request, sample in update.committed:
            number = request.request_id
            made = self.asked[number]
            has_ended = number in done
            ended = Completion(number, [], "", "length", None, 1) if has_ended else None
            made.generation.feed(0, [sample], ended)
            self.admission.advance(made.generation, 0, 1, has_ended=has_ended)
            if made.first is None:
                made.first = self.now - made.came
                self.admission.came_first(made.generation, self.now)
            if has_ended:
                made.done = self.now - made.came
                self.admission.came_last(made.generation, self.now)
                self.admission.leave(made.generation)
                self.ended.append(self.asked.pop(number))


def an_order(rng: random.Random, tenant: str = "") -> Order:
    params = SamplingParams(max_tokens=rng.randint(10, 60), ignore_eos=True)
    return Order([rng.randrange(1000) for _ in range(rng.randint(5, 120))], params, 0, tenant)


def poisson(
    rng: random.Random, rate: float, seconds: float, terms: Terms, tenant: str = ""
) -> list[tuple[float, Order, Terms]]:
    at, found = 0.0, []
    while (at := at + rng.expovariate(rate)) < seconds:
        found.append((at, an_order(rng, tenant), terms))
    return found


def test_a_line_through_passes() -> None:
    model = PassModel()
    for _ in range(20):
        model.observe(8, 0.05)
    assert model.pace.seconds(8) == pytest.approx(0.05)
    for tokens in (8, 100, 256, 30, 8):
        model.observe(tokens, 0.04 + tokens * 1e-3 + 0.002)
    assert model.pace.per_token == pytest.approx(1e-3, rel=0.2)
    before = model.pace.seconds(64)
    model.observe(64, 1000.0)  # a stage was replaced
    assert model.pace.seconds(64) < 1.5 * before
    for tokens in (3, 200) * 200:
        model.observe(tokens, 0.5)  # slower from now on, and tokens cost nothing
    assert model.pace.seconds(100) == pytest.approx(0.5, rel=0.05)
    assert model.pace.per_token == pytest.approx(0.0, abs=1e-4)


def test_passes_that_cost_less_with_more_tokens_have_no_negative_price() -> None:
    model = PassModel()
    for tokens in (1, 100, 1, 100):
        model.observe(tokens, 1.0 if tokens == 1 else 0.5)
    assert 0.0 == model.pace.per_token < model.pace.fixed


@pytest.mark.parametrize(
    "limits", [LIMITS, replace(LIMITS, num_pages=20), replace(LIMITS, token_budget=64)]
)
@pytest.mark.parametrize("rate", [4.0, 12.0])
def test_forecasts_of_first_tokens(limits: SchedulerConfig, rate: float) -> None:
    rng = random.Random(1)
    server = Simulated(limits, rng, noise=0.1)
    told = Terms(first_within=1000.0)
    server.run(poisson(rng, rate, 30.0, told), 30.0)
    known = [made for made in server.ended if made.came > 5.0]
    errors = [(made.first or 0.0) - made.forecast for made in known]
    waits = [made.first or 0.0 for made in known]
    # Of what is waited for; a pass more or less is the arrival's luck.
    assert abs(float(np.mean(errors))) <= 0.1 * float(np.mean(waits)) + 0.02
    assert float(np.percentile(np.abs(errors), 90)) <= 0.3 * float(np.mean(waits)) + 0.06


SECONDS, WARM = 25.0, 5.0


def tokens_per_second(found: list[Asked]) -> float:
    """Of answers that ended after a while: prompts and what was generated."""
    counted = [made for made in found if WARM < made.came + (made.done or 0) <= SECONDS]
    orders = [made.generation.orders[0] for made in counted]
    return sum(len(o.token_ids) + o.params.max_tokens for o in orders) / (SECONDS - WARM)


def make(rate: float, terms: Terms) -> list[tuple[float, Order, Terms]]:
    return poisson(random.Random(2), rate, SECONDS, terms)


@pytest.mark.parametrize(
    ("num_pages", "terms"), [(60, Terms(first_within=1.5)), (20, Terms(done_within=4.0))]
)
def test_five_times_too_much(num_pages: int, terms: Terms) -> None:
    """Those who are let in are served in time, and as much is done as if all were let in."""
    limits = replace(LIMITS, num_pages=num_pages)
    full = Simulated(limits, random.Random(0), noise=0.1)
    full.run(make(60.0, Terms()), SECONDS)
    most = tokens_per_second(full.ended)
    server = Simulated(limits, random.Random(0), noise=0.1)
    server.run(make(5 * most / 97, terms), SECONDS)
    first, done = terms.first_within or 99, terms.done_within or 99
    ended = [made for made in server.ended if made.came + (made.done or 0) > WARM]
    good = [made for made in ended if (made.first or 99) <= first and (made.done or 99) <= done]
    assert tokens_per_second(good) >= 0.9 * most
    assert len(good) >= 0.99 * len(ended)
    assert len(server.refused) > len(ended)
    assert all(error.status == 429 and (error.retry_after or 0) >= 1 for error in server.refused)


def test_a_batch_before_it_makes_nobody_wait() -> None:
    rng = random.Random(3)
    server = Simulated(LIMITS, rng)
    terms = Terms(priority=Priority.BATCH)
    batches = [(0.0, replace(an_order(rng), tenant="job"), terms) for _ in range(100)]
    people = poisson(rng, 1.0, 20.0, Terms(first_within=0.25))
    server.run(batches + people, 20.0)
    assert len(server.refused) <= 1
    first = [m.first or 9 for m in server.ended if m.generation.terms.first_within and m.came > 1]
    # Two passes that are under way, and its own.
    assert max(first) <= 3 * (0.02 + 1e-4 * LIMITS.token_budget) + 1e-6


def test_who_cannot_be_served_in_time_is_told_when_to_come_back() -> None:
    rng = random.Random(4)
    server = Simulated(LIMITS, rng)
    server.run([(0.0, an_order(rng), Terms()) for _ in range(200)], 5.0)
    assert server.ask(an_order(rng), Terms(first_within=0.5)) is None
    [error] = server.refused
    assert error.code == "deadline_unreachable"
    # By then the line has become as short as it has to be, and not long before.
    assert error.retry_after is not None and error.retry_after > 3
    server.run([], server.now + error.retry_after / 2)
    assert server.ask(an_order(rng), Terms(first_within=0.5)) is None
    server.run([], server.now + error.retry_after / 2)
    assert server.ask(an_order(rng), Terms(first_within=0.5)) is not None


def test_what_is_learned_from_a_bad_time_is_forgotten() -> None:
    """And where nobody is there, somebody is let in to find out how it is now."""
    rng = random.Random(5)
    server = Simulated(LIMITS, rng)
    for _ in range(30):
        server.model.observe(16, 5.0)
    assert server.ask(an_order(rng), Terms(first_within=2.0)) is None  # never was a pass so short
    server.model.observe(16, 0.1)
    assert server.ask(an_order(rng), Terms(first_within=2.0)) is not None
    assert server.ask(an_order(rng), Terms(first_within=2.0)) is None
    server.run([], 100.0)
    for _ in range(200):
        server.model.observe(16, 0.03)
    arrivals = [
        (200.0 + at, order, terms)
        for at, order, terms in poisson(rng, 1.0, 30.0, Terms(first_within=0.5))
    ]
    server.refused.clear()
    server.run(arrivals, 300.0)
    assert not server.refused


def test_who_is_alone_is_told_that_an_answer_takes_longer() -> None:
    server = Simulated(LIMITS, random.Random(6))
    tokens = list(range(20))

    def ask(num: int, seconds: float, **how: bool) -> bool:
        order = Order(tokens, SamplingParams(max_tokens=num, **how), 0)
        return server.ask(order, Terms(done_within=seconds)) is not None

    server.run([(0.0, Order(tokens, SamplingParams(max_tokens=4), 0), Terms())], 10.0)
    assert not ask(100, 1.9, ignore_eos=True)  # of 20 ms each at least
    assert server.refused[-1].code == "deadline_unreachable"
    assert not ask(100, 1.9)  # the last answer was as long as it might be
    server.now += 100.0  # which was long ago, and this one may end by itself
    assert not ask(100, 1.9, ignore_eos=True)
    assert not ask(100, 0.01)
    assert ask(100, 1.9)


def test_guesses_may_bring_an_answer_in_fewer_passes() -> None:
    server = Simulated(replace(LIMITS, drafts=DraftLimits(most=3)), random.Random(7))
    server.model.observe(1, 0.02)
    order = Order([1], SamplingParams(max_tokens=100, ignore_eos=True), 0)
    assert server.ask(order, Terms(done_within=0.4)) is None
    assert server.ask(order, Terms(done_within=0.6)) is not None


def test_a_pass_that_is_held_for_others_is_in_the_forecast_as_far_as_there_is_time() -> None:
    server = Simulated(LIMITS, random.Random(8))
    server.model.observe(16, 0.1)
    orders = [an_order(server.rng)]

    def promise(within: float, held: float | None) -> Promise:
        return server.admission.promise(
            orders, Terms(first_within=within), server.model.pace, 5.0, held
        )

    at_once = promise(10.0, 0.0)
    held = promise(10.0, 0.3)
    assert at_once.forecast and held.forecast
    assert held.forecast.first == pytest.approx(at_once.forecast.first + 0.3)
    assert held.forecast.done == pytest.approx(at_once.forecast.done + 0.3)
    assert 5.3 < held.begin_by < 10.0  # half of what is to spare
    # Where there is no time for it, it is let in all the same, and the pass is not held.
    tight = promise(0.2, 0.3)
    assert tight.forecast == at_once.forecast
    assert tight.begin_by == 5.0
    assert math.isinf(server.admission.promise(orders, Terms(), server.model.pace, 5.0).begin_by)


def test_those_for_whom_a_pass_is_held_have_no_pass_before_them() -> None:
    server = Simulated(LIMITS, random.Random(9))
    server.model.observe(16, 0.1)
    first, order = an_order(server.rng), an_order(server.rng)
    assert server.ask(first, Terms()) is not None
    terms, pace = Terms(first_within=10.0), server.model.pace
    running = server.admission.promise([order], terms, pace, 0.0).forecast
    held = server.admission.promise([order], terms, pace, 0.0, 0.02).forecast
    assert running and held
    assert held.first < running.first - 0.1


def test_while_nothing_is_known_of_passes_none_is_held_that_has_a_deadline() -> None:
    server = Simulated(LIMITS, random.Random(10))
    order = an_order(server.rng)
    made = server.admission.promise([order], Terms(first_within=9.0), server.model.pace, 5.0, 8.0)
    assert made.begin_by == 5.0
