"""The scheduler's rules, one by one."""

from collections.abc import Sequence

import pytest

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.errors import HeadraceError, RequestError
from headrace.scheduler.plan import PAGE_TOKENS, Pass, Sample, Slice
from headrace.scheduler.policy import attention_work, pack
from headrace.scheduler.request import FinishReason, Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.update import Update

EOS = 9


def make_scheduler(
    num_pages: int = 100,
    max_context: int = 1000,
    token_budget: int = 256,
    max_sequences: int = 16,
    micro_batches: int = 1,
    micro_batch_tokens: int = 256,
    passes_in_flight: int = 1,
    ahead: int = 0,
) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            num_pages,
            max_context,
            token_budget,
            max_sequences,
            micro_batches,
            micro_batch_tokens,
            passes_in_flight,
            ahead,
        )
    )


def make_request(request_id: int, prompt: int = 4, max_tokens: int = 8) -> Request:
    """No two requests have a prefix in common."""
    params, tokens = SamplingParams(max_tokens=max_tokens), [100 + request_id] * prompt
    return Request(request_id, tokens, params, seed=request_id, stop_ids=frozenset({EOS}))


def slices_of(a_pass: Pass | None) -> list[Slice]:
    assert a_pass is not None
    pieces = [piece for batch in a_pass.micro_batches for piece in batch.slices]
    return sorted(pieces, key=lambda piece: piece.request)


def requests_of(a_pass: Pass | None) -> list[int]:
    return [piece.request for piece in slices_of(a_pass)]


def run(scheduler: Scheduler, a_pass: Pass | None, token: int = 2) -> Update:
    """Return the pass, `token` being drawn wherever one is asked for."""
    assert a_pass is not None
    asked = [piece for piece in slices_of(a_pass) if piece.sampling is not None]
    return scheduler.update(a_pass, [Sample(piece.request, token, None, ()) for piece in asked])


@pytest.mark.parametrize("limit", range(7))
def test_config_refuses_limits_that_cannot_be_met(limit: int) -> None:
    values = [2] * 7
    values[limit] = 0
    with pytest.raises(HeadraceError, match="must be at least"):
        SchedulerConfig(*values)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        (0, 8, "prompt is empty"),
        (300, 8, "holds at most 299"),
        (100, 30, "need 3 KV pages"),
    ],
)
def test_add_refuses_what_can_never_run(prompt: int, max_tokens: int, message: str) -> None:
    scheduler = make_scheduler(num_pages=2, max_context=300)
    with pytest.raises(RequestError, match=message):
        scheduler.add(make_request(0, prompt, max_tokens))
    assert not scheduler.has_work
    assert scheduler.schedule() is None


def test_the_last_token_needs_no_page() -> None:
    scheduler = make_scheduler(num_pages=2)
    scheduler.add(make_request(0, prompt=PAGE_TOKENS, max_tokens=PAGE_TOKENS + 1))
    with pytest.raises(RequestError):
        scheduler.add(make_request(1, prompt=PAGE_TOKENS, max_tokens=PAGE_TOKENS + 2))
    while scheduler.has_work:
        run(scheduler, scheduler.schedule())
    assert scheduler.pool.num_free == 2


def test_a_request_prefills_in_chunks_then_decodes() -> None:
    scheduler = make_scheduler(token_budget=100, micro_batch_tokens=70)
    scheduler.add(make_request(0, prompt=150, max_tokens=2))
    seen = []
    while scheduler.has_work:
        a_pass = scheduler.schedule()
        [piece] = slices_of(a_pass)
        assert len(piece.pages) == -(-piece.end // PAGE_TOKENS)
        seen.append((piece.start, piece.end, piece.sampling is not None))
        run(scheduler, a_pass)
    assert seen == [(0, 70, False), (70, 140, False), (140, 150, True), (150, 151, True)]


def test_decodes_go_before_prefill_chunks_and_those_before_admissions() -> None:
    scheduler = make_scheduler(token_budget=10)
    scheduler.add(make_request(5, prompt=3))
    run(scheduler, scheduler.schedule())
    scheduler.add(make_request(2, prompt=20))
    run(scheduler, scheduler.schedule())
    scheduler.add(make_request(0, prompt=30))
    seen = []
    for _ in range(3):
        a_pass = scheduler.schedule()
        seen.append([(piece.request, len(piece.tokens)) for piece in slices_of(a_pass)])
        run(scheduler, a_pass)
    assert seen == [[(2, 9), (5, 1)], [(0, 7), (2, 2), (5, 1)], [(0, 8), (2, 1), (5, 1)]]


def test_a_pass_holds_at_most_max_sequences_and_passes_share_no_request() -> None:
    scheduler = make_scheduler(max_sequences=2)
    for request_id in range(5):
        scheduler.add(make_request(request_id))
    passes = [scheduler.schedule() for _ in range(4)]
    assert [requests_of(a_pass) for a_pass in passes[:3]] == [[0, 1], [2, 3], [4]]
    assert passes[3] is None
    assert [a_pass.step for a_pass in passes if a_pass is not None] == [1, 2, 3]


def test_requests_are_spread_over_the_passes_in_flight() -> None:
    scheduler = Scheduler(SchedulerConfig(100, 1000, 256, 16, 1, 256, passes_in_flight=3))
    for i in range(7):
        scheduler.add(make_request(i))
    passes = [scheduler.schedule() for _ in range(3)]
    assert [len(requests_of(a_pass)) for a_pass in passes] == [3, 3, 1]
    for a_pass in passes:
        run(scheduler, a_pass)
    assert len(requests_of(scheduler.schedule())) == 3


def test_lower_ids_are_admitted_first() -> None:
    scheduler = make_scheduler(max_sequences=1)
    scheduler.add(make_request(7))
    scheduler.add(make_request(3))
    assert requests_of(scheduler.schedule()) == [3]


def test_a_prompt_that_does_not_fit_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_pages=4)
    scheduler.add(make_request(0, prompt=100))
    scheduler.add(make_request(1, prompt=200))
    scheduler.add(make_request(2, prompt=1))
    assert requests_of(scheduler.schedule()) == [0]
    assert (scheduler.num_waiting, scheduler.num_running) == (2, 1)


def test_sampling_is_asked_for_at_the_end_only_and_sees_the_history() -> None:
    scheduler = make_scheduler(token_budget=3)
    params = SamplingParams(repetition_penalty=1.1)
    scheduler.add(Request(0, [1, 2, 3, 4], params, seed=5))
    first = scheduler.schedule()
    assert slices_of(first)[0].sampling is None
    run(scheduler, first)
    sampling = slices_of(scheduler.schedule())[0].sampling
    assert sampling is not None
    assert (sampling.seed, sampling.num_prompt, sampling.history) == (5, 4, (1, 2, 3, 4))


def test_a_stop_token_is_committed_and_ends_the_request() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(0))
    update = run(scheduler, scheduler.schedule(), token=EOS)
    [request] = update.finished
    assert request.finish_reason is FinishReason.STOP
    assert request.output == [EOS]
    assert [(r.request_id, s.token) for r, s in update.committed] == [(0, EOS)]
    assert not scheduler.has_work
    assert scheduler.pool.num_free == 100


@pytest.mark.parametrize(("prompt", "max_tokens", "output"), [(4, 3, 3), (4, 50, 6), (9, 1, 1)])
def test_output_ends_with_length_at_max_tokens_or_a_full_context(
    prompt: int, max_tokens: int, output: int
) -> None:
    scheduler = make_scheduler(max_context=10)
    request = make_request(0, prompt, max_tokens)
    scheduler.add(request)
    while scheduler.has_work:
        run(scheduler, scheduler.schedule())
    assert request.finish_reason is FinishReason.LENGTH
    assert request.num_output == output


def fill_two_pages_each(scheduler: Scheduler, requests: Sequence[Request]) -> None:
    """Run until each of the requests needs its third page."""
    for request in requests:
        scheduler.add(request)
    while any(request.num_scheduled < 2 * PAGE_TOKENS for request in requests):
        run(scheduler, scheduler.schedule())


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_pages=7, token_budget=512, micro_batch_tokens=512)
    requests = [make_request(i, prompt=120, max_tokens=60) for i in range(3)]
    fill_two_pages_each(scheduler, requests)
    scheduler.add(make_request(3, prompt=1))
    a_pass = scheduler.schedule()
    assert requests_of(a_pass) == [0, 1]
    assert scheduler.num_preemptions == 1
    assert (requests[2].pages, requests[2].num_scheduled) == ([], 0)
    tokens = len(requests[2].tokens)
    run(scheduler, a_pass)
    scheduler.abort(0)
    a_pass = scheduler.schedule()
    assert requests_of(a_pass) == [1, 2, 3]  # the others have all the pages that they can need
    piece = slices_of(a_pass)[1]
    # Its newest page went to request 0 at once, the full one before that was still there.
    assert (piece.start, piece.end) == (PAGE_TOKENS, tokens)
    assert piece.sampling is not None
    assert (scheduler.num_preemptions, scheduler.num_waiting) == (1, 0)


def test_the_youngest_waits_while_older_ones_are_in_flight() -> None:
    scheduler = make_scheduler(num_pages=5, token_budget=512, max_sequences=1)
    old, young = make_request(0, prompt=120, max_tokens=180), make_request(1, prompt=120)
    fill_two_pages_each(scheduler, [old])
    scheduler.add(young)
    first = scheduler.schedule()  # takes the fifth page for request 0 ...
    assert requests_of(first) == [0]
    second = scheduler.schedule()
    assert second is None  # ... and leaves two, less than the prompt and the watermark
    run(scheduler, first)
    assert scheduler.abort(0) is old
    assert requests_of(scheduler.schedule()) == [1]


def test_abort_of_a_waiting_request() -> None:
    scheduler = make_scheduler(max_sequences=1)
    requests = [make_request(i) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    assert scheduler.abort(0) is requests[0]
    assert scheduler.abort(0) is None
    assert requests[0].finish_reason is FinishReason.ABORT
    assert requests_of(scheduler.schedule()) == [1]
    assert scheduler.num_waiting == 1


def test_an_id_can_be_used_again_once_its_request_has_ended() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(0))
    scheduler.abort(0)
    scheduler.add(make_request(0))
    scheduler.add(make_request(1))
    assert requests_of(scheduler.schedule()) == [0, 1]
    assert scheduler.num_waiting == 0


def test_abort_in_flight_keeps_the_pages_until_the_pass_returns() -> None:
    scheduler = make_scheduler(num_pages=3)
    request = make_request(0, prompt=100)
    scheduler.add(request)
    a_pass = scheduler.schedule()
    scheduler.abort(0)
    assert scheduler.pool.num_free == 1
    assert scheduler.has_work
    scheduler.add(make_request(1, prompt=100))
    assert scheduler.schedule() is None  # not idle: pages come back with the pass
    update = run(scheduler, a_pass)
    assert (update.committed, update.finished) == ([], [])
    assert request.output == []
    assert scheduler.pool.num_free == 3
    assert requests_of(scheduler.schedule()) == [1]


def test_finish_truncates_the_output_even_when_the_next_pass_is_in_flight() -> None:
    scheduler = make_scheduler()
    request = make_request(0)
    scheduler.add(request)
    for token in (5, 6, 7):
        run(scheduler, scheduler.schedule(), token)
    in_flight = scheduler.schedule()
    assert scheduler.finish(0, FinishReason.STOP, 2) is request
    assert request.output == [5, 6]
    assert request.finish_reason is FinishReason.STOP
    assert run(scheduler, in_flight).committed == []
    assert request.output == [5, 6]
    assert not scheduler.has_work
    assert scheduler.pool.num_free == 100
    assert scheduler.finish(0, FinishReason.STOP, 1) is None


def test_an_update_with_other_samples_than_were_asked_for_is_our_error() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(0))
    a_pass = scheduler.schedule()
    assert a_pass is not None
    with pytest.raises(AssertionError):
        scheduler.update(a_pass, [])


def make_slice(request: int, start: int, count: int) -> Slice:
    return Slice(request, start, (0,) * count, (), None)


def test_attention_work_counts_the_keys_seen() -> None:
    assert attention_work(make_slice(0, 10, 1)) == 11
    assert attention_work(make_slice(0, 3, 4)) == 4 + 5 + 6 + 7


def test_pack_balances_tokens_and_attention_work() -> None:
    # Decodes of one token each: eight long contexts and eight short ones, which dealt out in turn
    # would leave two micro-batches with all the long ones.
    slices = [make_slice(i, 8000 if i % 4 < 2 else 80, 1) for i in range(16)]
    batches = pack(slices, 4, 100)
    assert [batch.num_tokens for batch in batches] == [4, 4, 4, 4]
    assert len({sum(map(attention_work, batch.slices)) for batch in batches}) == 1
    assert batches == pack(slices, 4, 100)


def test_pack_balances_tokens_when_attention_work_is_uneven() -> None:
    # Two long decodes outweigh all chunks in work; by work alone the chunks would pile up.
    slices = [make_slice(i, 100_000, 1) for i in range(2)]
    slices += [make_slice(i, 0, 10) for i in range(2, 6)]
    slices += [make_slice(6, 50_000, 1)]
    batches = pack(slices, 3, 100)
    assert max(batch.num_tokens for batch in batches) <= 21


def test_pack_keeps_every_stage_busy_and_drops_empty_micro_batches() -> None:
    slices = [make_slice(0, 0, 500), *(make_slice(i, 0, 1) for i in range(1, 4))]
    assert len(pack(slices, 4, 500)) == 4
    assert len(pack(slices, 3, 500)) == 3
    assert len(pack(slices[:2], 3, 500)) == 2


def test_pack_falls_back_to_the_order_of_choice_when_balancing_overflows() -> None:
    # Balanced, the long context gets 3 + 3 more tokens and the other micro-batch 4 + 4: the last
    # slice of 3 fits neither.
    sizes = [(0, 4), (0, 4), (0, 3), (0, 3), (900, 3), (0, 3)]
    slices = [make_slice(i, start, count) for i, (start, count) in enumerate(sizes)]
    first, second = pack(slices, 2, 10)
    assert [piece.request for piece in first.slices] == [0, 2, 4]
    assert [piece.request for piece in second.slices] == [1, 3, 5]


def test_the_whole_budget_is_used_whatever_the_prompts() -> None:
    scheduler = make_scheduler(token_budget=30, micro_batches=3, micro_batch_tokens=10)
    for request_id in range(6):
        scheduler.add(make_request(request_id, prompt=7))
    a_pass = scheduler.schedule()
    assert a_pass is not None
    assert [batch.num_tokens for batch in a_pass.micro_batches] == [10, 10, 10]
