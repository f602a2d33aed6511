"""Whatever tiers do with pages, every request ends with exactly its tokens."""

import random
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import pytest
from fake_tiers import GARBAGE, Content, FakeStage, FakeTiers
from guessable import VOCABULARY, draw, next_token
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.scheduler.config import DraftLimits, KVCosts, SchedulerConfig
from headrace.scheduler.contexts import ContextIds
from headrace.scheduler.kv_stats import KVStats
from headrace.scheduler.moves import MoveReports
from headrace.scheduler.pages import PageState, pages_for
from headrace.scheduler.plan import FOLLOWS, PAGE_TOKENS, MoveKind, Pass, Sample, Slice
from headrace.scheduler.prefixes import extend_keys
from headrace.scheduler.request import FinishReason, Priority, Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler


@dataclass
class Ring:
    """Stages that compute at once, move when they please, and read contexts from pages alone."""

    tiers: FakeTiers
    requests: dict[int, Request]
    host_pages: int
    has_tails: bool
    tails: dict[int, dict[int, tuple[int, int]]] = field(default_factory=dict)
    in_flight: deque[tuple[Pass, list[Sample], set[int]]] = field(default_factory=deque)
    drawn: dict[int, dict[int, int]] = field(default_factory=dict)
    computed: int = 0
    cold: int = 0
    sunk: int = 0
    spoiled: int = 0
    drafts: int = 0
    cold_drafts: int = 0

    def submit(self, a_pass: Pass) -> None:
        pieces = slices_of(a_pass)
        assert pieces or a_pass.moves or self.tiers.under_way, "a pass of nothing"
        assert pieces or not self.in_flight, "a pass of moves in the way of others"
        flying = pieces + [p for made, _, _ in self.in_flight for p in slices_of(made)]
        self.check_pages(a_pass, flying)
        self.tiers.start(a_pass.moves)
        drawn = self.drawn.get(a_pass.follows or 0, {})
        # What follows tokens that are worth nothing is worth nothing, which no stage can know.
        tainted = {i for made, _, bad in self.in_flight for i in bad}
        spoiled = {piece.request for piece in pieces if self.is_spoiled(piece)}
        samples = [
            sample
            for piece in pieces
            for sample in self.compute(piece, drawn, piece.request in spoiled | tainted)
        ]
        self.drawn[a_pass.step] = {sample.request: sample.token for sample in samples}
        self.in_flight.append((a_pass, samples, spoiled))
        self.spoiled += len(spoiled)
        self.computed += a_pass.num_tokens

    def check_pages(self, a_pass: Pass, flying: list[Slice]) -> None:
        """What passes in flight read and write is not what moves write, nor what others write."""
        read = {(page, piece.request) for piece in flying for page in piece.pages}
        written = {
            (page, piece.request)
            for piece in flying
            for page in piece.pages[piece.start // PAGE_TOKENS - len(piece.cold) :]
        }
        slots = {slot for piece in flying for slot in piece.cold}
        holders = Counter(page for page, _ in read)
        assert all(holders[page] == 1 for page, _ in written), "a shared page is written"
        pages = {page for page, _ in read}
        for move in (*self.tiers.under_way, *a_pass.moves):
            if move.kind in (MoveKind.OUT, MoveKind.FETCH):
                assert move.slot not in slots, "a cold page is written"
            if move.kind is MoveKind.SINK:
                assert move.nvme_slot + self.host_pages not in slots, "a cold page is written"
            if move.kind is MoveKind.IN:
                assert move.page not in pages, "a page is used before it has come"
            elif move.kind is MoveKind.OUT:
                assert move.page not in {page for page, _ in written}, "written while it leaves"

    def is_spoiled(self, piece: Slice) -> bool:
        sunk = [slot - self.host_pages for slot in piece.cold if slot >= self.host_pages]
        return any(self.tiers.read_window(place) is None for place in sunk)

    def compute(self, piece: Slice, drawn: dict[int, int], bad: bool) -> list[Sample]:
        """What is computed of pages that are `bad` is garbage, wherever it goes."""
        request, before = self.requests[piece.request], piece.start // PAGE_TOKENS
        new = [drawn[piece.request]] if piece.tokens == (FOLLOWS,) else list(piece.tokens)
        known: list[object] = [request.tenant, *request.tokens[: before * PAGE_TOKENS]]
        hot = len(piece.cold)
        assert hot <= before, "a cold page is written"
        self.cold += hot
        for number in range(before):
            if bad:
                continue
            if number < hot and piece.cold[number] >= self.host_pages:
                self.sunk += 1
                found = self.tiers.read_window(piece.cold[number] - self.host_pages) or ()
            elif number < hot:
                found = self.tiers.read_slot(piece.cold[number])
            else:
                found = self.tiers.read(piece.pages[number - hot])
            assert found == tuple(known[: 1 + (number + 1) * PAGE_TOKENS]), "another's page"
        tail = self.tails.setdefault(piece.tail, {})
        if bad:
            return self.spoil(piece)
        origin = 0 if self.has_tails else before * PAGE_TOKENS
        entries = [tail[origin + at] for at in range(piece.start % PAGE_TOKENS)]
        assert all(owner == piece.request for owner, _ in entries)
        known += [token for _, token in entries] + new
        for number in range(before, piece.end // PAGE_TOKENS):
            content: Content = tuple(known[: 1 + (number + 1) * PAGE_TOKENS])
            self.tiers.write(piece.pages[number - hot], content)
        first, origin = piece.end // PAGE_TOKENS * PAGE_TOKENS, 0
        if not self.has_tails:
            first = origin = piece.start
        rest = enumerate(known[1 + first :], origin)
        tail.update((at, (piece.request, token)) for at, token in rest)  # type: ignore[misc]
        assert piece.num_pages == pages_for(piece.end)
        self.drafts += piece.num_drafts
        self.cold_drafts += piece.num_drafts if hot else 0
        return draw(piece, known[1:])

    def spoil(self, piece: Slice) -> list[Sample]:
        """Garbage in all that the slice writes."""
        first, last = piece.start // PAGE_TOKENS, piece.end // PAGE_TOKENS
        for number in range(first, last):
            page = piece.pages[number - len(piece.cold)]
            self.tiers.write(page, ("spoiled",))
        self.tails[piece.tail] = {}
        return [] if piece.sampling is None else [Sample(piece.request, 1, None, ())]


def slices_of(a_pass: Pass) -> list[Slice]:
    return [piece for batch in a_pass.micro_batches for piece in batch.slices]


class Driver:
    """An engine that adds, continues and ends requests at random, and knows what each must say."""

    def __init__(
        self,
        config: SchedulerConfig,
        rng: random.Random,
        *,
        loss: float = 0.0,
        lossy: Collection[MoveKind] = tuple(MoveKind),
        interference: float = 0.0,
        replacing: float = 0.0,
        damage: float = 0.0,
        batches: float = 0.0,
        breaking: float = 0.0,
    ) -> None:
        self.batches, self.breaking = batches, breaking
        self.scheduler = Scheduler(config)
        self.replacing, self.put_back = replacing, 0
        self.config, self.rng, self.interference = config, rng, interference
        self.requests: dict[int, Request] = {}
        self.live: dict[int, Request] = {}
        tiers = FakeTiers(rng, loss=loss, lossy=lossy)
        self.loss, self.damage = loss, damage
        self.ring = Ring(tiers, self.requests, config.host_pages, config.num_tails > 0)
        self.reports = MoveReports(len(tiers.stages))
        self.stories = [[rng.randrange(VOCABULARY) for _ in range(200)] for _ in range(2)]
        self.waiting: deque[Request] = deque()
        self.most_pages = 0

    def new(self, tokens: list[int] | None = None) -> None:
        """Queue a request that continues `tokens`, or else the beginning of a story."""
        rng, config = self.rng, self.config
        if tokens is None:
            # Those that end shortly before a page does need another one soon.
            tokens = rng.choice(self.stories)[: rng.choice([30, 60, 64, 65, 124, 128, 150, 190])]
            tokens = tokens + [rng.randrange(VOCABULARY) for _ in range(rng.choice([0, 1, 40]))]
        number = len(self.requests)
        request = Request(
            number,
            tokens[: config.max_context - 1],
            SamplingParams(max_tokens=rng.randint(1, 130)),
            seed=number,
            stop_ids=frozenset({3}) if rng.random() < 0.2 else frozenset(),
            tenant=rng.choice(["", "", "other"]),
            keep=rng.random() < 0.3,
        )
        if self.batches and rng.random() < self.batches:
            request = replace(request, priority=Priority.BATCH, weight=rng.randint(1, 3))
        self.requests[number] = request
        self.waiting.append(request)

    def run(self, count: int, depth: int) -> KVStats:
        for _ in range(count):
            self.new()
        rounds = 0
        while self.waiting or self.scheduler.has_work:
            rounds += 1
            assert rounds < 20_000, "no end"
            while self.waiting and self.rng.random() < 0.5:
                self.add(self.waiting.popleft())
            if self.live and self.rng.random() < self.interference:
                self.interfere(self.rng.choice(list(self.live.values())))
            if self.rng.random() < self.replacing:
                self.come_to_rest()
                self.replace_stage(self.rng.choice(self.ring.tiers.stages))
            while len(self.ring.in_flight) < depth and (a_pass := self.scheduler.schedule()):
                self.check_batches(a_pass)
                self.ring.submit(a_pass)
            assert self.ring.in_flight or not self.live
            if self.rng.random() < self.breaking:
                self.break_off()
            elif self.ring.in_flight:
                self.collect()
            self.check()
        self.check_answers()
        return self.scheduler.kv_stats()

    def check_batches(self, a_pass: Pass) -> None:
        """Slices with cold pages have micro-batches of their own, which fit a ring."""
        config, batches = self.config, a_pass.micro_batches
        cold = [batch for batch in batches if batch.num_cold]
        assert len(cold) <= config.cold_micro_batches
        assert len(batches) - len(cold) <= config.micro_batches
        assert len(slices_of(a_pass)) <= config.max_sequences
        assert a_pass.num_tokens <= config.token_budget
        assert all(0 < batch.num_tokens <= config.micro_batch_tokens for batch in batches)
        for batch in cold:
            assert all(piece.cold for piece in batch.slices)
            assert sum(piece.num_pages for piece in batch.slices) <= config.kv_ring_pages

    def come_to_rest(self) -> None:
        for _ in range(1000):
            while self.ring.in_flight:
                self.collect()
            if (a_pass := self.scheduler.settle()) is None:
                return
            self.ring.submit(a_pass)
        raise AssertionError("no rest")

    def break_off(self) -> None:
        """Passes in flight are broken off; then some stage may have nothing any more, but for its log."""
        self.ring.tiers.abandon()
        self.scheduler.abandon([a_pass for a_pass, _, _ in self.ring.in_flight])
        self.ring.in_flight.clear()
        self.reports = MoveReports(len(self.ring.tiers.stages))
        self.check()
        if self.rng.random() < 0.5:
            stage = self.rng.choice(self.ring.tiers.stages)
            for memory in (stage.device, stage.host, stage.window):
                memory.clear()
            if self.config.num_tails:
                self.ring.tails.clear()
            self.put_back += self.scheduler.lose(self.scheduler.contexts())
            self.scheduler.retain(stage.log.keys())
            self.check()

    def replace_stage(self, stage: FakeStage) -> None:
        """Another one has what the scheduler says, but for some of it and the window, and maybe the log."""
        chance = self.rng.choice([0.0, 0.1, 0.5, 1.0])
        held = self.scheduler.contexts()
        lost = ContextIds(
            *(
                tuple(i for i in ids if self.rng.random() < chance)
                for ids in (held.pages, held.tails, held.slots)
            ),
            window=held.window,
        )
        stage.window.clear()
        for has, ids, gone in (
            (stage.device, held.pages, lost.pages),
            (stage.host, held.slots, lost.slots),
        ):
            left = {i: GARBAGE if i in gone else has[i] for i in ids if i in has}
            has.clear()
            has.update(left)
        if self.config.num_tails:
            left_tails = {*held.tails} - {*lost.tails}
            self.ring.tails = {i: tail for i, tail in self.ring.tails.items() if i in left_tails}
        if self.rng.random() < 0.3:
            stage.log.clear()
        self.put_back += self.scheduler.lose(lost)
        self.scheduler.retain(stage.log.keys())
        self.check()

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.live[request.request_id] = request

    def interfere(self, request: Request) -> None:
        if self.rng.random() < 0.5:
            count = self.rng.randint(0, request.num_output)
            self.scheduler.finish(request.request_id, FinishReason.STOP, count)
        else:
            self.scheduler.abort(request.request_id)
        del self.live[request.request_id]

    def collect(self) -> None:
        a_pass, samples, spoiled = self.ring.in_flight.popleft()
        self.name_contents(a_pass)
        self.ring.tiers.damage(self.damage)
        self.ring.tiers.drop_from_logs(self.loss / 10)
        results = self.ring.tiers.report(a_pass.step, everything=not a_pass.micro_batches)
        ended = self.reports.merge(results)
        update = self.scheduler.update(a_pass, samples, *ended, spoiled=spoiled)
        self.name_contents(a_pass)  # of drafts that proved right, too
        for request, _ in update.committed:
            assert request.request_id in self.live, "a token after the end"
        for request in update.finished:
            del self.live[request.request_id]
            if self.rng.random() < 0.2 and len(request.tokens) < self.config.max_context - 20:
                self.new(request.tokens + [self.rng.randrange(VOCABULARY) for _ in range(9)])

    def name_contents(self, a_pass: Pass) -> None:
        """What keys stand for, by a reckoning of its own."""
        for piece in slices_of(a_pass):
            request, keys = self.requests[piece.request], []
            full = min(piece.end, len(request.tokens)) // PAGE_TOKENS
            extend_keys(keys, self.config.identity, request.tenant, request.tokens, full)
            for number, key in enumerate(keys):
                content = (request.tenant, *request.tokens[: (number + 1) * PAGE_TOKENS])
                assert self.ring.tiers.contents.setdefault(key, content) == content

    def check(self) -> None:
        scheduler = self.scheduler
        held = {id(r): r for r in (*self.live.values(), *scheduler._roster.in_flight.values())}
        scheduler.holdings.check_integrity([*held.values()])
        assert scheduler.num_waiting + scheduler.num_running == len(self.live)
        self.most_pages = max(self.most_pages, sum(r.num_pages for r in self.live.values()))
        for request in self.live.values():
            assert (request.tail is None) == (not request.num_pages)
            assert request.num_pending > 0 or request.is_spoiled
            states = map(scheduler.pool.state, request.pages)
            coming = sum(state is PageState.COMING for state in states)
            assert coming == len(request.coming)

    def check_answers(self) -> None:
        for request in self.requests.values():
            assert request.finish_reason is not None and request.pages == request.slots == []
            tokens = request.tokens[: request.num_prompt]
            while len(tokens) < len(request.tokens):
                tokens.append(next_token(tokens))
            assert tokens == request.tokens
        assert self.scheduler.pool.count(PageState.USED) == 0
        assert self.scheduler.kv_stats().host.used == self.scheduler.kv_stats().sunk == 0
        assert self.scheduler.tails.num_free == self.scheduler.tails.num_pages


NO_DRAFTS, DRAFTS = DraftLimits(), DraftLimits(most=8, most_tokens=10_000)


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    num_pages = draw(st.sampled_from([8, 6, 5, 4, 3, 2]))
    full = num_pages * PAGE_TOKENS + 1
    host_pages = draw(st.sampled_from([20, 5, 3, 2, 1, 0]))
    ring = draw(st.sampled_from([num_pages, 2 * num_pages, 3, 0]))
    return SchedulerConfig(
        num_pages=num_pages,
        max_context=draw(st.sampled_from([full, full - 20, full // 2])),
        token_budget=draw(st.sampled_from([400, 100, 64, 20])),
        max_sequences=draw(st.sampled_from([8, 4, 2, 1])),
        micro_batches=draw(st.integers(1, 2)),
        micro_batch_tokens=draw(st.sampled_from([300, 64, 30])),
        passes_in_flight=draw(st.integers(1, 3)),
        ahead=draw(st.integers(0, 1)),
        num_tails=draw(st.sampled_from([0, 4, 1])),
        host_pages=host_pages,
        nvme_pages=draw(st.sampled_from([30, 4, 1, 0])) if host_pages else 0,
        kv_ring_pages=ring,
        cold_micro_batches=draw(st.integers(1, 3)) if ring else 0,
        window_pages=draw(st.sampled_from([40, 10, 3, 1, 0])) if ring else 0,
        hot_window=draw(st.sampled_from([0, 64, 100])),
        write_backs=draw(st.sampled_from([1, 3, 16])),
        write_through=draw(st.booleans()),
        drafts=draw(st.sampled_from([NO_DRAFTS, DRAFTS, replace(DRAFTS, most_tokens=12)])),
        costs=draw(
            st.sampled_from(
                [
                    KVCosts(),
                    KVCosts(40.0, 50.0, 1.0),
                    KVCosts(20.0, 70.0, 1.0, decode=50.0),
                ]
            )
        ),
    )


@settings(max_examples=60, deadline=None, database=None)
@given(
    config=configs(),
    count=st.sampled_from([12, 8, 5, 2]),
    depth=st.integers(1, 4),
    loss=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    lossy=st.sets(st.sampled_from(MoveKind)),
    interference=st.sampled_from([0.0, 0.02]),
    replacing=st.sampled_from([0.0, 0.1]),
    damage=st.sampled_from([0.0, 0.01, 0.2]),
    batches=st.sampled_from([0.5, 0.2, 0.0]),
    breaking=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 2**32),
)
def test_every_request_ends_with_its_tokens_whatever_is_lost(
    config: SchedulerConfig,
    count: int,
    depth: int,
    loss: float,
    lossy: set[MoveKind],
    interference: float,
    replacing: float,
    damage: float,
    batches: float,
    breaking: float,
    seed: int,
) -> None:
    driver = Driver(
        config,
        random.Random(seed),
        loss=loss,
        lossy=lossy,
        interference=interference,
        replacing=replacing,
        damage=damage,
        batches=batches,
        breaking=breaking,
    )
    driver.run(count, depth)


def test_writing_through_takes_no_slot_that_it_has_just_begun_to_spill() -> None:
    config = SchedulerConfig(
        num_pages=6,
        max_context=3 * PAGE_TOKENS,
        token_budget=400,
        max_sequences=4,
        micro_batches=2,
        micro_batch_tokens=300,
        host_pages=2,
        nvme_pages=30,
        write_backs=3,
        write_through=True,
    )
    # Pages that could not be written come again, and are spilled from where they lie.
    Driver(config, random.Random(192), loss=0.5, lossy={MoveKind.SPILL}).run(12, 1)


SEEDS = [
    pytest.param(range(2), id="few"),
    pytest.param(range(2, 8), id="many", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("ahead", [0, 1])
def test_all_tiers_are_used(ahead: int, seeds: range) -> None:
    config = SchedulerConfig(
        num_pages=7,
        max_context=6 * PAGE_TOKENS,
        token_budget=128,
        max_sequences=4,
        micro_batches=2,
        micro_batch_tokens=64,
        ahead=ahead,
        host_pages=6,
        nvme_pages=40,
        write_backs=4,
    )
    hits, moved, swaps = Counter[str](), Counter[MoveKind](), 0
    for seed in seeds:
        driver = Driver(config, random.Random(seed), interference=0.01)
        stats = driver.run(20, 1 + ahead)
        hits.update(device=stats.hits.device, host=stats.hits.host, nvme=stats.hits.nvme)
        moved.update(stats.moved)
        swaps += stats.preempted_by_swap
    assert all(hits[tier] > 0 for tier in ("device", "host", "nvme"))
    assert all(moved[kind] > 0 for kind in MoveKind if kind is not MoveKind.SINK)
    assert swaps > 0


HOSTING = SchedulerConfig(
    num_pages=7,
    max_context=6 * PAGE_TOKENS,
    token_budget=300,
    max_sequences=12,
    micro_batches=2,
    micro_batch_tokens=150,
    host_pages=40,
    kv_ring_pages=12,
    cold_micro_batches=3,
)


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("num_tails", [0, 12])
def test_what_decodes_over_host_memory_carries_drafts(num_tails: int, seeds: range) -> None:
    drafts = accepted = 0
    for config in (HOSTING, replace(HOSTING, host_pages=8, window_pages=40, hot_window=64)):
        for seed in seeds:
            some = replace(config, num_tails=num_tails, drafts=DRAFTS)
            driver = Driver(some, random.Random(seed), interference=0.01)
            driver.run(20, 1)
            drafts += driver.ring.cold_drafts
            accepted += driver.scheduler.speculation.counts.accepted
    assert drafts > 100 and accepted > 100


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("ahead", [0, 1])
def test_requests_decode_over_pages_in_host_memory_and_come_back(ahead: int, seeds: range) -> None:
    cold = most = moved = 0
    for seed in seeds:
        driver = Driver(replace(HOSTING, ahead=ahead), random.Random(seed), interference=0.01)
        stats = driver.run(20, 1 + ahead)
        assert stats.preempted_by_recompute + stats.preempted_by_swap <= 3
        cold += driver.ring.cold
        most = max(most, driver.most_pages)
        moved += stats.moved[MoveKind.IN]
    assert cold > 1000 and moved > 20
    assert most > 2 * HOSTING.num_pages


SINKING = replace(HOSTING, host_pages=8, window_pages=40, hot_window=64)


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize(("config", "num_tails"), [(HOSTING, 0), (HOSTING, 12), (SINKING, 12)])
def test_whatever_a_replaced_stage_has_lost_is_computed_again(
    config: SchedulerConfig, num_tails: int, seeds: range
) -> None:
    put_back = cold = 0
    for seed in seeds:
        some = replace(config, nvme_pages=20, num_tails=num_tails)
        driver = Driver(some, random.Random(seed), replacing=0.1)
        driver.run(20, 1)
        put_back += driver.put_back
        cold += driver.ring.cold
    assert put_back > 50 and cold > 100


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize(("config", "num_tails"), [(HOSTING, 0), (HOSTING, 12), (SINKING, 12)])
@pytest.mark.parametrize("drafts", [NO_DRAFTS, DRAFTS])
def test_passes_that_are_broken_off_cost_no_token(
    config: SchedulerConfig, num_tails: int, drafts: DraftLimits, seeds: range
) -> None:
    put_back = 0
    for seed in seeds:
        some = replace(
            config, nvme_pages=20, num_tails=num_tails, drafts=drafts, ahead=1, passes_in_flight=2
        )
        driver = Driver(some, random.Random(seed), breaking=0.05, interference=0.01)
        driver.run(20, 3)
        put_back += driver.put_back
    assert put_back > 50


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("ahead", [0, 1])
def test_where_host_memory_is_short_old_pages_sink(ahead: int, seeds: range) -> None:
    """As many requests at once as with host memory for all, and with none to compute again."""
    sunk = more = most = given_way = 0
    for seed in seeds:
        driver = Driver(replace(SINKING, ahead=ahead), random.Random(seed))
        stats = driver.run(20, 1 + ahead)
        assert stats.moved[MoveKind.SINK] > 0 and not stats.spoiled
        assert stats.preempted_by_recompute + stats.preempted_by_swap <= 1
        sunk += driver.ring.sunk
        more += driver.most_pages
        without = Driver(replace(SINKING, ahead=ahead, window_pages=0), random.Random(seed))
        stats = without.run(20, 1 + ahead)
        most += without.most_pages
        given_way += stats.preempted_by_recompute + stats.preempted_by_swap
    assert sunk > 1000
    assert more > 1.1 * most and given_way > 0


def test_pages_do_not_sink_while_host_memory_has_room() -> None:
    driver = Driver(replace(HOSTING, host_pages=60, window_pages=40), random.Random(0))
    assert driver.run(20, 1).moved[MoveKind.SINK] == 0 < driver.ring.cold


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("depth", [1, 3])
def test_damage_on_nvme_costs_computation_and_no_token(depth: int, seeds: range) -> None:
    spoiled = 0
    for seed in seeds:
        config = replace(SINKING, ahead=int(depth > 1), passes_in_flight=max(1, depth - 1))
        driver = Driver(config, random.Random(seed), damage=0.05, interference=0.01)
        spoiled += driver.run(20, depth).spoiled
    assert spoiled > 5


def test_without_room_in_a_ring_nobody_is_hosted() -> None:
    for limits in ({"host_pages": 1}, {"kv_ring_pages": 1}, {"costs": KVCosts(1.0, decode=0.5)}):
        driver = Driver(replace(HOSTING, **limits), random.Random(0))
        driver.run(20, 1)
        assert driver.ring.cold == 0


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("kind", MoveKind)
def test_a_kind_of_move_that_never_succeeds_holds_up_nobody(kind: MoveKind, seeds: range) -> None:
    config = SchedulerConfig(
        num_pages=6,
        max_context=5 * PAGE_TOKENS,
        token_budget=256,
        max_sequences=4,
        micro_batches=1,
        micro_batch_tokens=256,
        host_pages=4,
        nvme_pages=40,
        kv_ring_pages=6,
        cold_micro_batches=1,
        window_pages=10,
    )
    lost = 0
    for seed in seeds:
        driver = Driver(config, random.Random(seed), loss=1.0, lossy={kind})
        lost += driver.run(14, 1).lost[kind]
    assert lost > 0
