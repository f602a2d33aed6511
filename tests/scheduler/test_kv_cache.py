"""Pages, slots and moves against a plain model: nothing lost, doubled or leaked, nothing wrong read."""

import random
from collections import Counter

import pytest
from fake_tiers import FakeTiers

from headrace.scheduler.config import KVCosts, SchedulerConfig
from headrace.scheduler.holdings import Holdings
from headrace.scheduler.kv_stats import KVStats
from headrace.scheduler.moves import MoveReports
from headrace.scheduler.pages import PageState, pages_for
from headrace.scheduler.plan import PAGE_TOKENS
from headrace.scheduler.request import FinishReason, Request, SamplingParams

LONGEST = 6 * PAGE_TOKENS


def make_config(**limits: object) -> SchedulerConfig:
    room: dict[str, object] = {"num_pages": 10, "host_pages": 6, "nvme_pages": 12, "write_backs": 2}
    return SchedulerConfig(
        max_context=LONGEST,
        token_budget=512,
        max_sequences=8,
        micro_batches=1,
        micro_batch_tokens=512,
        **(room | limits),  # type: ignore[arg-type]
    )


class Model:
    """Requests that hold pages, and what each page of theirs has to hold, kept without a cache."""

    def __init__(self, config: SchedulerConfig, seed: int, loss: float) -> None:
        self.rng, self.loss = random.Random(seed), loss
        self.holdings = Holdings(config)
        self.tiers = FakeTiers(self.rng, loss=loss)
        self.reports = MoveReports(len(self.tiers.stages))
        self.requests: dict[int, Request] = {}
        self.in_flight: list[tuple[Request, int]] = []  # computed up to there, not returned yet
        self.stories = [[self.rng.randrange(50) for _ in range(LONGEST)] for _ in range(4)]
        self.done: Counter[str] = Counter()
        self.next_id = 0

    def tokens(self) -> list[int]:
        """The beginning of a story, and mostly another end."""
        story = self.rng.choice(self.stories)
        tokens = story[: self.rng.randint(1, LONGEST - 1)]
        if self.rng.random() < 0.5:
            tokens += [self.rng.randrange(50) for _ in range(self.rng.randint(1, 80))]
        return tokens[: LONGEST - 1]

    def step(self) -> None:
        """One operation, chosen at random among those that are possible now."""
        idle = [r for r in self.requests.values() if not r.coming and not r.passes]
        # Mostly those that have computed something; those that wait for pages go, too.
        going = [r for r in idle if r.num_scheduled > r.num_named * PAGE_TOKENS]
        going += [r for r in self.requests.values() if r.coming and self.rng.random() < 0.05]
        choice = self.rng.random()
        if choice < 0.15:
            self.admit()
        elif choice < 0.4 and idle:
            self.compute(self.rng.choice(idle))
        elif choice < 0.6 and self.in_flight:
            self.land()
        elif choice < 0.68 and going:
            self.end(self.rng.choice(going))
        elif choice < 0.72 and going:
            self.give_way(self.rng.choice(going))
        elif choice < 0.78 and idle:
            self.host(self.rng.choice(idle))
        elif choice < 0.86:
            self.tiers.start(self.holdings.take_moves())
        else:
            self.settle()

    def admit(self) -> None:
        self.next_id += 1
        request = Request(
            self.next_id,
            self.tokens(),
            SamplingParams(),
            seed=0,
            tenant=self.rng.choice(["", "", "other"]),
            keep=self.rng.random() < 0.2,
        )
        if not self.holdings.admit(request, len(request.tokens) + 1, self.rng.choice([0, 0, 2])):
            self.done["refused"] += 1
            return
        self.requests[request.request_id] = request
        self.done["hits"] += request.num_named
        self.done["coming"] += len(request.coming)
        assert request.num_scheduled < len(request.tokens)
        assert len(request.pages) == pages_for(len(request.tokens) + 1)

    def host(self, request: Request) -> None:
        """A step of a request that goes to host RAM, or comes back from there; it is in no pass."""
        cold, pool = self.holdings.cold, self.holdings.pool
        if request.returning:
            cold.come_back(request)
            self.done["back"] += not request.is_hosted
        elif request.num_cold and self.rng.random() < 0.4:
            if pool.can_allocate(request.num_cold):
                cold.recall(request)
        else:
            request.is_hosted = True
            cold.retire(request)
            cold.send_out(request)
            self.done["cold"] += request.num_cold

    def compute(self, request: Request) -> None:
        """Read the pages before `num_scheduled` and fill those behind; the pass returns later."""
        start, end = request.num_scheduled, self.rng.randint(1, len(request.tokens))
        if start >= end:
            return
        cold = request.num_cold
        for number in range(start // PAGE_TOKENS):
            if number < cold:
                found = self.tiers.read_slot(request.slots[number])
            else:
                found = self.tiers.read(request.pages[number - cold])
            assert found == self.content(request, number)
            self.done["read"] += 1
        for number in range(start // PAGE_TOKENS, end // PAGE_TOKENS):
            page = request.pages[number - cold]
            others = [r for r in self.requests.values() if page in r.pages and r is not request]
            assert not others, "a shared page was written"
            self.tiers.write(page, self.content(request, number))
        request.num_scheduled = end
        request.passes.append(1)
        self.in_flight.append((request, end))

    def content(self, request: Request, number: int) -> tuple[object, ...]:
        return (request.tenant, *request.tokens[: (number + 1) * PAGE_TOKENS])

    def land(self) -> None:
        request, end = self.in_flight.pop(self.rng.randrange(len(self.in_flight)))
        request.passes.clear()
        self.holdings.name(request, end)
        for number, key in enumerate(request.keys):
            content = self.tiers.contents.setdefault(key, self.content(request, number))
            assert content == self.content(request, number), "two contents of one key"

    def end(self, request: Request) -> None:
        request.finish_reason = self.rng.choice([FinishReason.STOP, FinishReason.ABORT])
        self.holdings.release(request)
        del self.requests[request.request_id]

    def give_way(self, request: Request) -> None:
        self.holdings.give_way(request)
        del self.requests[request.request_id]

    def settle(self, *, everything: bool = False) -> None:
        self.tiers.drop_from_logs(self.loss / 50)
        if everything:
            self.tiers.start(self.holdings.take_moves())
        results = self.tiers.report(0, everything=everything)
        for request in self.holdings.settle(*self.reports.merge(results)):
            self.done["failed"] += 1
            self.holdings.release(request)
            del self.requests[request.request_id]

    def check(self) -> None:
        """Every page's holders are those requests that have it, and counts add up."""
        requests = [*self.requests.values()]
        self.holdings.check_integrity(requests)
        held = Counter(page for request in requests for page in request.pages)
        held.update(page for request in requests for page in request.returning)
        pool = self.holdings.pool
        for page in range(pool.num_pages):
            assert pool.is_held(page) == (page in held)
        stats = self.holdings.stats()
        assert stats.device.total == pool.num_pages
        assert stats.host.total == self.holdings.cache.tiers.host.num_pages
        lost = {page for request in requests for page in request.returning if not pool.key(page)}
        for page in held.keys() - lost:
            count = held[page]
            assert count == 1 or pool.key(page) is not None, "a page without a key is shared"
        waiting = set().union(*(request.coming for request in self.requests.values()))
        assert waiting <= {page for page in held if pool.state(page) is PageState.COMING}

    def finish(self) -> KVStats:
        """End everything; all pages have to come back."""
        while self.in_flight:
            self.land()
        for request in [*self.requests.values()]:
            self.end(request)
        while self.holdings.is_moving:
            self.settle(everything=True)
        self.check()
        stats = self.holdings.stats()
        assert stats.device.free + stats.device.cached == stats.device.total
        assert stats.host.free + stats.host.cached == stats.host.total
        return stats


CASES = [
    make_config(),
    make_config(nvme_pages=0),
    make_config(host_pages=0, nvme_pages=0),
    make_config(num_pages=6, host_pages=1, nvme_pages=40),
    make_config(num_pages=14, host_pages=30, nvme_pages=3, write_backs=8),
    # NVMe costs more than computing, and host RAM more than half.
    make_config(costs=KVCosts(host_page=40.0, nvme_page=100.0, token=1.0)),
]


@pytest.mark.parametrize("loss", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_random_operations_lose_double_and_leak_nothing(case: int, loss: float) -> None:
    """100,000 operations over all cases."""
    model = Model(CASES[case], seed=100 * case + int(100 * loss), loss=loss)
    for _ in range(5600):
        model.step()
        model.check()
    stats = model.finish()
    assert model.done["read"] > 50 and model.done["hits"] > 50
    assert (model.done["coming"] > 0) == (CASES[case].host_pages > 0)
    assert (sum(stats.lost.values()) > 0) == (loss > 0 and CASES[case].host_pages > 0)
    assert stats.host.total or not sum(stats.moved.values())
    assert (model.done["cold"] > 0) == (CASES[case].host_pages > 1)
    assert model.done["back"] > 0 or not model.done["cold"]
