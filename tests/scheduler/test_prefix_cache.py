"""Rules of sharing, loading, swapping and saving pages, one by one."""

from collections.abc import Sequence

import pytest

from headrace.scheduler.config import KVCosts, SchedulerConfig
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.kv_stats import TierHits
from headrace.scheduler.pages import PageState
from headrace.scheduler.plan import NO_PAGE, PAGE_TOKENS, MoveKind, PageMove, Pass, Sample, Slice
from headrace.scheduler.policy import best_prefix, swap_beats_recompute
from headrace.scheduler.prefixes import extend_keys
from headrace.scheduler.request import FinishReason, Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.update import Update

P = PAGE_TOKENS
OUT, IN, SPILL, FETCH, _ = MoveKind


def make_scheduler(
    num_pages: int = 20,
    host_pages: int = 0,
    nvme_pages: int = 0,
    *,
    write_backs: int = 16,
    costs: KVCosts | None = None,
    ahead: int = 0,
    token_budget: int = 1000,
    identity: str = "",
) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            num_pages=num_pages,
            max_context=640,
            token_budget=token_budget,
            max_sequences=16,
            micro_batches=1,
            micro_batch_tokens=token_budget,
            ahead=ahead,
            host_pages=host_pages,
            nvme_pages=nvme_pages,
            write_backs=write_backs,
            costs=costs or KVCosts(),
            identity=identity,
        )
    )


def make_request(
    number: int,
    prompt: int,
    max_tokens: int = 1,
    *,
    story: int = 0,
    tenant: str = "",
    keep: bool = False,
) -> Request:
    """The first `prompt` tokens of a story."""
    tokens = [1000 * story + i for i in range(prompt)]
    params = SamplingParams(max_tokens=max_tokens)
    return Request(number, tokens, params, seed=0, tenant=tenant, keep=keep)


def must(a_pass: Pass | None) -> Pass:
    assert a_pass is not None
    return a_pass


def slices_of(a_pass: Pass | None) -> list[Slice]:
    return [piece for batch in must(a_pass).micro_batches for piece in batch.slices]


def starts_of(a_pass: Pass | None) -> dict[int, int]:
    return {piece.request: piece.start for piece in slices_of(a_pass)}


def give_back(
    scheduler: Scheduler,
    a_pass: Pass | None,
    moved: Sequence[PageMove] = (),
    lost: Sequence[PageMove] = (),
    token: int = 5,
) -> Update:
    asked = [piece.request for piece in slices_of(a_pass) if piece.sampling is not None]
    samples = [Sample(i, token, None, ()) for i in asked]
    ended = [move.number for move in moved], [move.number for move in lost]
    update = scheduler.update(must(a_pass), samples, *ended)
    scheduler.holdings.check_integrity()
    return update


def serve(scheduler: Scheduler, *requests: Request) -> None:
    """Run to the end; moves end with the pass that carries them."""
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        a_pass = must(scheduler.schedule())
        give_back(scheduler, a_pass, a_pass.moves)


def kinds(a_pass: Pass | None) -> list[MoveKind]:
    return [move.kind for move in must(a_pass).moves]


def keys_of(tokens: Sequence[int], count: int) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, "", "", tokens, count)
    return keys


# Sharing on the device


@pytest.mark.parametrize(
    ("prompt", "start"),
    [(P, 0), (P + 1, P), (2 * P, P), (2 * P + 1, 2 * P), (3 * P, 2 * P)],
)
def test_full_pages_are_found_and_a_token_is_computed_in_any_case(prompt: int, start: int) -> None:
    scheduler = make_scheduler()
    serve(scheduler, make_request(0, 2 * P))
    scheduler.add(make_request(1, prompt))
    assert starts_of(scheduler.schedule()) == {1: start}
    stats = scheduler.kv_stats()
    assert (stats.hits.device, stats.hits.tokens.device) == (start // P, start)
    assert stats.misses == 1 + (prompt - 1) // P - start // P  # one of request 0's


def test_a_page_is_not_shared_before_its_pass_has_returned() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(0, 2 * P + 1, max_tokens=9))
    first = scheduler.schedule()
    scheduler.add(make_request(1, 2 * P + 1))
    second = scheduler.schedule()
    assert starts_of(second) == {1: 0}
    give_back(scheduler, first)
    scheduler.add(make_request(2, 2 * P + 1))
    third = scheduler.schedule()
    assert starts_of(third) == {0: 2 * P + 1, 2: 2 * P}
    pages = {piece.request: piece.pages for piece in slices_of(third)}
    assert pages[0][:2] == pages[2][:2] and pages[0][2] != pages[2][2]
    for a_pass in (second, third):
        give_back(scheduler, a_pass)
    # Request 1 computed what request 0 had; nobody needs it twice.
    assert scheduler.pool.count(PageState.CACHED) == 0


def test_output_is_shared_as_prompts_are() -> None:
    scheduler = make_scheduler()
    request = make_request(0, P - 3, max_tokens=5)
    serve(scheduler, request)
    follow_up = Request(1, [*request.tokens, 1, 2], SamplingParams(max_tokens=1), seed=0)
    scheduler.add(follow_up)
    assert starts_of(scheduler.schedule()) == {1: P}


def test_a_page_made_ahead_of_its_last_token_is_found_under_that_token() -> None:
    scheduler = make_scheduler(ahead=1)
    request = make_request(0, P - 1, max_tokens=9)
    scheduler.add(request)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert slices_of(second)[0].follows and slices_of(second)[0].end == P
    give_back(scheduler, first, token=7)
    assert request.num_named == 0
    give_back(scheduler, second, token=8)
    assert request.num_named == 1
    assert scheduler.pool.find(keys_of(request.tokens, 1)[0]) == request.pages[0]
    assert request.tokens[P - 1] == 7


def test_tokens_behind_a_stop_string_make_no_page() -> None:
    scheduler = make_scheduler(ahead=1)
    request = make_request(0, P - 1, max_tokens=9)
    scheduler.add(request)
    first, second = scheduler.schedule(), scheduler.schedule()
    give_back(scheduler, first)
    scheduler.finish(0, FinishReason.STOP, 0)
    give_back(scheduler, second)
    assert scheduler.pool.count(PageState.CACHED) == 0
    assert scheduler.pool.count(PageState.FREE) == 20


def test_an_aborted_request_leaves_what_it_computed() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(0, 2 * P + 9))
    a_pass = scheduler.schedule()
    scheduler.abort(0)
    give_back(scheduler, a_pass)
    scheduler.add(make_request(1, 2 * P + 9))
    assert starts_of(scheduler.schedule()) == {1: 2 * P}


def test_tenants_share_nothing() -> None:
    scheduler = make_scheduler()
    serve(scheduler, make_request(0, 2 * P, tenant="a"))
    for number, tenant in enumerate(("b", "", "a"), 1):
        scheduler.add(make_request(number, 2 * P, tenant=tenant))
    assert starts_of(scheduler.schedule()) == {1: 0, 2: 0, 3: P}


def test_shared_pages_are_no_reason_to_wait() -> None:
    scheduler = make_scheduler(num_pages=6)
    scheduler.add(make_request(0, 4 * P + 1, max_tokens=9))
    give_back(scheduler, scheduler.schedule())
    scheduler.add(make_request(1, 4 * P + 1))
    assert starts_of(scheduler.schedule()) == {0: 4 * P + 1, 1: 4 * P}
    assert scheduler.pool.num_free == 0


def test_what_was_found_again_outlives_what_was_not() -> None:
    """Only where there is a tier to save it to: else the coldest goes first."""
    for host_pages, survivor in ((4, 0), (0, 1)):
        scheduler = make_scheduler(num_pages=8, host_pages=host_pages)
        for number, story in enumerate((0, 0, 1)):
            serve(scheduler, make_request(number, P + 1, story=story))
        serve(scheduler, make_request(3, 7 * P, story=2))
        assert scheduler.pool.num_evicted == 1
        found = scheduler.pool.find(keys_of(make_request(0, P, story=survivor).tokens, 1)[0])
        assert found is not None


# Costs


def test_a_prefix_is_taken_as_far_as_it_gains() -> None:
    assert best_prefix([]) == 0
    assert best_prefix([1, 1, -1]) == 2
    assert best_prefix([1, -1, -1, 3]) == 4
    assert best_prefix([-1, 2, -2, 1]) == 2
    assert best_prefix([-2, 1]) == 0
    assert best_prefix([0, 0]) == 2


def test_swapping_pays_for_both_ways() -> None:
    assert swap_beats_recompute(KVCosts(host_page=32.0, token=1.0))
    assert not swap_beats_recompute(KVCosts(host_page=33.0, token=1.0))


def test_nvme_without_host_slots_is_refused() -> None:
    with pytest.raises(HeadraceError, match="reached through host RAM"):
        make_scheduler(nvme_pages=9)


# Loading


def adopted(**limits: object) -> tuple[Scheduler, list[bytes]]:
    """NVMe holds two pages of story 0."""
    room: dict[str, object] = {"host_pages": 4, "nvme_pages": 9}
    scheduler = make_scheduler(**(room | limits))  # type: ignore[arg-type]
    keys = keys_of(make_request(0, 2 * P).tokens, 2)
    scheduler.adopt(keys)
    return scheduler, keys


def test_pages_of_an_earlier_run_come_through_a_slot_and_the_request_waits() -> None:
    scheduler, keys = adopted()
    request = make_request(0, 2 * P + 1)
    scheduler.add(request)
    first = must(scheduler.schedule())
    assert (first.micro_batches, first.num_tokens) == ((), 0)
    assert [(move.kind, move.page, move.key) for move in first.moves] == [
        (FETCH, NO_PAGE, key) for key in keys
    ]
    assert scheduler.schedule() is None and scheduler.has_work
    give_back(scheduler, first, first.moves)
    second = must(scheduler.schedule())
    assert [(m.kind, m.page, m.slot) for m in second.moves] == [
        (IN, request.pages[i], move.slot) for i, move in enumerate(first.moves)
    ]
    assert slices_of(second) == []
    give_back(scheduler, second, second.moves)
    third = must(scheduler.schedule())
    assert (starts_of(third), third.moves) == ({0: 2 * P}, ())
    assert scheduler.kv_stats().hits == TierHits(nvme=2)
    give_back(scheduler, third)


def test_who_loads_holds_up_nobody() -> None:
    scheduler, _ = adopted()
    scheduler.add(make_request(0, 2 * P + 1))
    scheduler.add(make_request(1, P, story=1, max_tokens=9))
    first = must(scheduler.schedule())
    assert starts_of(first) == {1: 0} and kinds(first) == [FETCH, FETCH]
    give_back(scheduler, first)
    second = must(scheduler.schedule())  # nothing has come yet
    assert starts_of(second) == {1: P} and second.moves == ()
    give_back(scheduler, second, first.moves)
    third = must(scheduler.schedule())
    give_back(scheduler, third, third.moves)
    assert starts_of(scheduler.schedule()) == {1: P + 2, 0: 2 * P}


def test_two_who_want_a_page_wait_for_one_load() -> None:
    scheduler, _ = adopted()
    for number in range(2):
        scheduler.add(make_request(number, 2 * P + 1))
    first = must(scheduler.schedule())
    assert kinds(first) == [FETCH, FETCH]
    give_back(scheduler, first, first.moves)
    second = must(scheduler.schedule())
    assert kinds(second) == [IN, IN]
    give_back(scheduler, second, second.moves)
    assert starts_of(scheduler.schedule()) == {0: 2 * P, 1: 2 * P}


def test_more_pages_than_slots_come_one_after_the_other() -> None:
    scheduler, _ = adopted(host_pages=1)
    scheduler.add(make_request(0, 2 * P + 1))
    seen = []
    while not slices_of(a_pass := must(scheduler.schedule())):
        seen.append(kinds(a_pass))
        give_back(scheduler, a_pass, a_pass.moves)
    # The slot is taken for the second page when the first one is on the device.
    assert seen == [[FETCH], [IN], [FETCH], [IN]]
    assert starts_of(a_pass) == {0: 2 * P}


def test_what_is_dearer_to_load_than_to_compute_is_computed() -> None:
    scheduler, _ = adopted(costs=KVCosts(host_page=1.0, nvme_page=65.0, token=1.0))
    scheduler.add(make_request(0, 2 * P + 1))
    assert starts_of(scheduler.schedule()) == {0: 0}
    assert scheduler.kv_stats().misses == 2


def test_a_page_lost_on_nvme_is_forgotten_and_computed() -> None:
    scheduler, keys = adopted()
    scheduler.add(make_request(0, 2 * P + 1))
    first = must(scheduler.schedule())
    give_back(scheduler, first, first.moves[:1], first.moves[1:])
    assert scheduler.kv_stats().nvme == 1
    second = must(scheduler.schedule())
    while not slices_of(second):  # the first page still comes
        give_back(scheduler, second, second.moves)
        second = must(scheduler.schedule())
    assert starts_of(second) == {0: P}
    stats = scheduler.kv_stats()
    assert (stats.hits.total, stats.misses, stats.lost[FETCH]) == (1, 1, 1)
    assert scheduler.num_preemptions == 0
    assert keys[1] not in scheduler.holdings.cache.tiers.nvme


def test_a_page_damaged_in_host_ram_is_forgotten_everywhere_and_computed() -> None:
    scheduler, _ = adopted()
    scheduler.add(make_request(0, P + 1))
    first = must(scheduler.schedule())
    give_back(scheduler, first, first.moves)
    second = must(scheduler.schedule())
    assert kinds(second) == [IN]
    give_back(scheduler, second, (), second.moves)
    assert starts_of(scheduler.schedule()) == {0: 0}
    stats = scheduler.kv_stats()
    assert (stats.lost[IN], stats.nvme, stats.host.free, stats.hits.total) == (1, 1, 4, 0)


def test_a_load_that_nobody_waits_for_goes_no_further() -> None:
    scheduler, _ = adopted()
    scheduler.add(make_request(0, P + 1))
    scheduler.add(make_request(1, P, story=1, max_tokens=9))
    first = must(scheduler.schedule())
    assert kinds(first) == [FETCH]
    scheduler.abort(0)
    assert scheduler.pool.count(PageState.COMING) == 0
    give_back(scheduler, first, first.moves)
    assert must(scheduler.schedule()).moves == ()
    assert scheduler.kv_stats().host.cached == 1  # for the next one


# Swapping


def two_rivals(host_pages: int, **limits: object) -> tuple[Scheduler, Request, Request]:
    """Two requests with three full pages each, of which the older one now needs another."""
    scheduler = make_scheduler(num_pages=7, host_pages=host_pages, **limits)  # type: ignore[arg-type]
    old = make_request(0, 3 * P - 1, max_tokens=70)
    young = make_request(1, 3 * P - 1, max_tokens=70, story=1)
    for request in (old, young):
        scheduler.add(request)
    give_back(scheduler, scheduler.schedule())
    give_back(scheduler, scheduler.schedule())
    scheduler.pool.allocate(1)  # somebody else's
    assert (len(old.pages), len(young.pages), scheduler.pool.num_free) == (3, 3, 0)
    return scheduler, old, young


def test_a_victims_pages_go_out_and_who_needs_one_waits_for_it() -> None:
    scheduler, old, young = two_rivals(host_pages=6)
    first = must(scheduler.schedule())
    # All three of the victim's pages are full, so that there is none to be had at once.
    assert slices_of(first) == []
    assert kinds(first) == [OUT, OUT, OUT]
    assert {move.cohort for move in first.moves} == {1}
    assert (young.pages, scheduler.num_running, scheduler.num_waiting) == ([], 1, 1)
    give_back(scheduler, first, first.moves[:1])
    second = must(scheduler.schedule())  # one is enough
    assert starts_of(second) == {0: 3 * P}
    assert second.moves == ()
    give_back(scheduler, second, first.moves[1:])
    assert scheduler.kv_stats().preempted_by_swap == 1
    assert len(old.pages) == 4


def test_a_victim_comes_back_with_its_pages() -> None:
    scheduler, _, young = two_rivals(host_pages=6)
    seen = []
    while 0 in scheduler._roster.live:
        a_pass = must(scheduler.schedule())
        seen += kinds(a_pass)
        give_back(scheduler, a_pass, a_pass.moves)
    while not slices_of(a_pass := must(scheduler.schedule())):
        seen += kinds(a_pass)
        give_back(scheduler, a_pass, a_pass.moves)
    assert starts_of(a_pass) == {1: 3 * P}
    stats = scheduler.kv_stats()
    assert seen.count(OUT) == 3 and seen.count(IN) == stats.hits.host > 0
    assert stats.hits.total == 3
    assert young.num_cached == 0  # of its own prompt, nothing was there when it came


def test_without_slots_a_victims_pages_are_taken_at_once() -> None:
    scheduler, _, _ = two_rivals(host_pages=0)
    first = must(scheduler.schedule())
    assert starts_of(first) == {0: 3 * P}
    assert first.moves == ()
    assert scheduler.kv_stats().preempted_by_recompute == 1


def test_a_victim_whose_pages_are_cheaply_computed_is_not_swapped() -> None:
    scheduler, _, _ = two_rivals(host_pages=6, costs=KVCosts(host_page=40.0, token=1.0))
    first = must(scheduler.schedule())
    assert starts_of(first) == {0: 3 * P}
    assert first.moves == ()
    assert scheduler.kv_stats().preempted_by_recompute == 1


def test_the_first_pages_are_swapped_where_slots_are_few() -> None:
    scheduler, _, young = two_rivals(host_pages=2)
    pages = list(young.pages)
    first = must(scheduler.schedule())
    assert starts_of(first) == {0: 3 * P}  # with the victim's third page
    assert [move.page for move in first.moves] == pages[1::-1]
    assert scheduler.kv_stats().preempted_by_recompute == 1


def test_a_swap_that_is_lost_costs_a_computation() -> None:
    scheduler, _, _ = two_rivals(host_pages=6)
    first = must(scheduler.schedule())
    give_back(scheduler, first, (), first.moves)
    assert scheduler.kv_stats().host.free == 6
    while 0 in scheduler._roster.live:
        a_pass = must(scheduler.schedule())
        give_back(scheduler, a_pass, a_pass.moves)
    assert starts_of(scheduler.schedule()) == {1: P}  # request 0 has taken two pages


# Saving


def share_pages(scheduler: Scheduler, stories: int) -> None:
    """One page of each story is found twice."""
    for story in range(stories):
        serve(scheduler, make_request(2 * story, P + 1, story=story))
        serve(scheduler, make_request(2 * story + 1, P + 1, story=story))


def test_pages_that_were_found_again_are_written_back_when_others_run_short() -> None:
    scheduler = make_scheduler(num_pages=32, host_pages=20, write_backs=1)
    share_pages(scheduler, 30)
    # Two pages of 32 are to be had without loss, and one a pass is saved.
    stats = scheduler.kv_stats()
    assert 0 < stats.moved[OUT] < 10
    scheduler.add(make_request(100, 4 * P, story=99, max_tokens=3))
    moves = []
    while scheduler.has_work:
        a_pass = must(scheduler.schedule())
        assert len(a_pass.moves) <= 1
        moves += a_pass.moves
        give_back(scheduler, a_pass, a_pass.moves)
    assert all(move.kind is OUT for move in moves)


def test_pages_of_one_request_alone_are_not_worth_the_link() -> None:
    scheduler = make_scheduler(num_pages=8, host_pages=20)
    for story in range(20):
        serve(scheduler, make_request(story, 3 * P, story=story))
    stats = scheduler.kv_stats()
    assert not any(stats.moved.values())
    assert stats.evicted_from_device > 0


def test_host_ram_is_written_back_to_nvme() -> None:
    scheduler = make_scheduler(num_pages=8, host_pages=4, nvme_pages=100, write_backs=2)
    share_pages(scheduler, 40)
    stats = scheduler.kv_stats()
    assert stats.moved[OUT] > 4 and stats.moved[SPILL] > 0
    assert stats.nvme == stats.moved[SPILL]
    serve(scheduler, make_request(1000, P + 1, story=0))
    stats = scheduler.kv_stats()
    assert (stats.hits.nvme, stats.moved[FETCH], stats.moved[IN]) == (1, 1, 1)


@pytest.mark.parametrize("nvme_pages", [0, 9])
def test_a_request_to_be_continued_goes_down_at_once(nvme_pages: int) -> None:
    scheduler = make_scheduler(host_pages=4, nvme_pages=nvme_pages)
    scheduler.add(make_request(0, 2 * P + 1, keep=True))
    scheduler.add(make_request(1, 9, story=1, max_tokens=9))
    give_back(scheduler, scheduler.schedule())
    first = must(scheduler.schedule())
    assert kinds(first) == [OUT, OUT]
    give_back(scheduler, first, first.moves)
    second = must(scheduler.schedule())
    assert kinds(second) == ([SPILL, SPILL] if nvme_pages else [])
    give_back(scheduler, second, second.moves)
    stats = scheduler.kv_stats()
    assert (stats.host.cached, stats.nvme) == (2, 2 if nvme_pages else 0)
    # It is on the device, too, as long as there is room.
    scheduler.add(make_request(2, 2 * P + 1))
    assert starts_of(scheduler.schedule())[2] == 2 * P
    assert scheduler.kv_stats().hits == TierHits(device=2)


def test_an_aborted_request_is_not_kept() -> None:
    scheduler = make_scheduler(host_pages=4)
    scheduler.add(make_request(0, 2 * P + 1, max_tokens=9, keep=True))
    give_back(scheduler, scheduler.schedule())
    scheduler.abort(0)
    scheduler.add(make_request(1, 9, story=1))
    assert must(scheduler.schedule()).moves == ()


def test_counts_add_up() -> None:
    scheduler, _, _ = two_rivals(host_pages=6, nvme_pages=7)
    while scheduler.has_work:
        a_pass = must(scheduler.schedule())
        stats = scheduler.kv_stats()
        assert (stats.device.total, stats.host.total) == (7, 6)
        assert stats.device.leaving <= 3
        give_back(scheduler, a_pass, a_pass.moves)
    stats = scheduler.kv_stats()
    assert (stats.device.used, stats.device.coming, stats.device.leaving) == (1, 0, 0)
    assert scheduler.num_preemptions == stats.preempted_by_swap + stats.preempted_by_recompute
