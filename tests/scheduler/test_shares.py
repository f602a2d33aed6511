"""People and batches together: who goes first, who gives way, and that everybody gets a share."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.plan import PAGE_TOKENS, Pass, Sample, Slice
from headrace.scheduler.request import Priority, Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.shares import BATCH_PART

CONFIG = SchedulerConfig(
    num_pages=100,
    max_context=1000,
    token_budget=256,
    max_sequences=32,
    micro_batches=1,
    micro_batch_tokens=256,
)


def make(number: int, prompt: int = 4, output: int = 8, **given: object) -> Request:
    params, tokens = SamplingParams(max_tokens=output), [100 + number] * prompt
    return Request(number, tokens, params, seed=number, **given)  # type: ignore[arg-type]


def batch(number: int, prompt: int = 4, output: int = 8, **given: object) -> Request:
    return make(number, prompt, output, priority=Priority.BATCH, **given)


def slices_of(a_pass: Pass | None) -> list[Slice]:
    return [] if a_pass is None else [p for b in a_pass.micro_batches for p in b.slices]


def requests_of(a_pass: Pass | None) -> list[int]:
    return sorted(piece.request for piece in slices_of(a_pass))


def finish(scheduler: Scheduler, a_pass: Pass | None) -> list[int]:
    """Return the pass; the requests that it ended. Moves have ended, too."""
    assert a_pass is not None
    asked = [piece for piece in slices_of(a_pass) if piece.sampling is not None]
    samples = [Sample(piece.request, 2, None, ()) for piece in asked]
    moved = [move.number for move in a_pass.moves]
    return [r.request_id for r in scheduler.update(a_pass, samples, moved).finished]


def step(scheduler: Scheduler) -> Counter[int]:
    """Tokens of a pass by request."""
    a_pass = scheduler.schedule()
    finish(scheduler, a_pass)
    return Counter({piece.request: len(piece.tokens) for piece in slices_of(a_pass)})


def test_batches_fill_what_interactive_requests_leave_and_keep_their_pages() -> None:
    scheduler = Scheduler(replace(CONFIG, max_sequences=3))
    batches = [batch(i, output=40) for i in range(3)]
    for request in batches:
        scheduler.add(request)
    assert step(scheduler).keys() == {0, 1, 2}
    for i in range(3, 6):
        scheduler.add(make(i, output=5))
    assert step(scheduler).keys() == {3, 4, 5}
    assert all(request.pages for request in batches)
    scheduler.abort(3)
    assert step(scheduler).keys() == {0, 4, 5}
    assert scheduler.num_preemptions == 0


def test_decodes_of_batches_come_behind_prompts_of_others() -> None:
    scheduler = Scheduler(replace(CONFIG, token_budget=10))
    scheduler.add(batch(0, prompt=2))
    step(scheduler)
    scheduler.add(make(1, prompt=19))
    assert [step(scheduler) for _ in range(2)] == [{1: 10}, {0: 1, 1: 9}]


def test_a_batch_gives_its_pages_to_whoever_asks_in_the_same_pass() -> None:
    scheduler = Scheduler(replace(CONFIG, num_pages=9, max_context=500))
    for i in range(4):
        scheduler.add(batch(i, prompt=100, output=200))
    for _ in range(3):
        step(scheduler)
    assert scheduler.num_running == 4
    assert scheduler.batch_counts == (4, 0)
    scheduler.add(make(4, prompt=200))
    assert step(scheduler)[4] == 200
    assert scheduler.num_preemptions == 2  # the two youngest, which had two pages each
    assert scheduler.num_running == 3
    assert scheduler.batch_counts == (2, 2)
    while scheduler.has_work:
        step(scheduler)


def test_batches_in_flight_give_way_as_soon_as_they_come_back() -> None:
    config = replace(CONFIG, num_pages=8, max_context=500, ahead=1)
    scheduler = Scheduler(config)
    for i in range(4):
        scheduler.add(batch(i, prompt=100, output=200))
    first, second = scheduler.schedule(), scheduler.schedule()
    finish(scheduler, first)
    scheduler.add(make(4, prompt=300))
    third = scheduler.schedule()
    finish(scheduler, second)
    fourth = scheduler.schedule()
    assert 4 in requests_of(third) + requests_of(fourth)


def test_a_batch_that_gave_way_goes_on_from_its_pages_in_host_memory() -> None:
    scheduler = Scheduler(replace(CONFIG, num_pages=8, max_context=500, host_pages=16))
    for i in range(2):
        scheduler.add(batch(i, prompt=190, output=60))
    computed = step(scheduler)
    for _ in range(3):
        computed += step(scheduler)
    scheduler.add(make(2, prompt=300, output=3))
    for _ in range(3):  # one for pages to go out, and two for its tokens
        computed += step(scheduler)
    assert computed[2] == 300
    while scheduler.has_work:
        computed += step(scheduler)
    assert scheduler.kv_stats().preempted_by_swap > 0
    assert scheduler.kv_stats().preempted_by_recompute == 0
    # The newest page was computed again, and no other.
    assert all(computed[i] <= 249 + PAGE_TOKENS for i in range(2))


def test_growth_takes_batches_pages_before_younger_interactive_ones() -> None:
    scheduler = Scheduler(replace(CONFIG, num_pages=6, max_context=300))
    scheduler.add(make(0, prompt=120, output=60))
    scheduler.add(batch(1, prompt=60, output=100))
    scheduler.add(make(2, prompt=100, output=20))
    for _ in range(15):
        step(scheduler)
    assert scheduler.num_preemptions > 0
    assert {0, 2} <= step(scheduler).keys()


def backlog(
    scheduler: Scheduler, owners: dict[str, int], sizes: Callable[[str], tuple[int, int]]
) -> Counter[str]:
    """Tokens that owners got of 600 passes, each of whom has always 30 requests there."""
    live: dict[int, str] = {}
    got: Counter[str] = Counter()
    number = 0
    for _ in range(600):
        for owner, weight in owners.items():
            while sum(each == owner for each in live.values()) < 30:
                prompt, output = sizes(owner)
                scheduler.add(make(number, prompt, output, tenant=owner, weight=weight))
                live[number], number = owner, number + 1
        a_pass = scheduler.schedule()
        for piece in slices_of(a_pass):
            got[live[piece.request]] += len(piece.tokens)
        for ended in finish(scheduler, a_pass):
            del live[ended]
    return got


@pytest.mark.parametrize(
    "weights", [{"ann": 1, "bob": 1}, {"ann": 1, "bob": 3}, {"ann": 1, "bob": 2, "cid": 5}]
)
@pytest.mark.parametrize("limit", ["places", "pages"])
def test_owners_share_by_weight_whatever_they_ask_for(weights: dict[str, int], limit: str) -> None:
    rng = random.Random(0)
    few = {"max_sequences": 6} if limit == "places" else {"num_pages": 20}
    largest = {"ann": 120, "bob": 20, "cid": 60}

    def sizes(owner: str) -> tuple[int, int]:
        return rng.randint(1, largest[owner]), rng.randint(1, largest[owner])

    got = backlog(Scheduler(replace(CONFIG, **few)), weights, sizes)
    for owner, weight in weights.items():
        fair = sum(got.values()) * weight / sum(weights.values())
        assert got[owner] == pytest.approx(fair, rel=0.1)


def test_who_was_away_has_saved_up_nothing() -> None:
    scheduler = Scheduler(replace(CONFIG, max_sequences=2))
    for i in range(200):
        scheduler.add(make(i, output=10, tenant="ann"))
    for _ in range(300):
        step(scheduler)
    for i in range(200, 300):
        scheduler.add(make(i, output=10, tenant="bob"))
    got: Counter[str] = Counter()
    for _ in range(400):
        for number, count in step(scheduler).items():
            got["ann" if number < 200 else "bob"] += count
    assert got["bob"] == pytest.approx(got["ann"], rel=0.1)


@pytest.mark.parametrize("limits", [{"max_sequences": 4}, {"max_sequences": 1}, {"num_pages": 9}])
def test_interactive_requests_without_end_leave_batches_their_part(
    limits: dict[str, int],
) -> None:
    """Of the tokens that are computed, where only places are scarce; else each of them ends."""
    rng, config = random.Random(0), replace(CONFIG, **({"max_context": 400} | limits))
    scheduler = Scheduler(config)
    waiting = {i: batch(i, prompt=60, output=80, tenant=f"job {i % 2}") for i in range(3)}
    for request in waiting.values():
        scheduler.add(request)
    number, live, got = 10, 0, Counter[bool]()
    for _ in range(20_000):
        while live < 40:
            scheduler.add(make(number, rng.randint(1, 80), rng.randint(1, 80)))
            number, live = number + 1, live + 1
        a_pass = scheduler.schedule()
        for piece in slices_of(a_pass):
            got[piece.request < 10] += len(piece.tokens)
        for ended in finish(scheduler, a_pass):
            live -= waiting.pop(ended, None) is None
        if not waiting:
            break
    assert not waiting
    assert got[True] <= sum(got.values()) / 4, "they do not go first"
    if "num_pages" not in limits:
        assert got[True] >= 0.9 * sum(got.values()) / BATCH_PART


def test_batches_alone_are_scheduled_as_interactive_requests_alone() -> None:
    rng = random.Random(1)
    sizes = [(rng.randint(1, 200), rng.randint(1, 100)) for _ in range(30)]
    seen = []
    for kind in (make, batch):
        scheduler = Scheduler(replace(CONFIG, num_pages=12, max_sequences=6))
        for i, (prompt, output) in enumerate(sizes):
            scheduler.add(kind(i, prompt, output))
        passes = []
        while scheduler.has_work:
            a_pass = scheduler.schedule()
            passes.append(a_pass)
            finish(scheduler, a_pass)
        assert scheduler.num_preemptions > 0
        seen.append(passes)
    assert seen[0] == seen[1]
