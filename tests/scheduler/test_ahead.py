"""Passes that are made before the samples of the ones they follow are known."""

import pytest

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.plan import FOLLOWS, PAGE_TOKENS, Pass, Sample, Slice
from headrace.scheduler.request import FinishReason, Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.update import Update

EOS = 9


def make_scheduler(
    *, num_pages: int = 100, token_budget: int = 512, passes_in_flight: int = 1
) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            num_pages=num_pages,
            max_context=1000,
            token_budget=token_budget,
            max_sequences=16,
            micro_batches=1,
            micro_batch_tokens=token_budget,
            passes_in_flight=passes_in_flight,
            ahead=1,
        )
    )


def make_request(request_id: int, prompt: int = 4, max_tokens: int = 8) -> Request:
    params = SamplingParams(max_tokens=max_tokens, repetition_penalty=1.1)
    return Request(request_id, [1] * prompt, params, seed=request_id, stop_ids=frozenset({EOS}))


def must(a_pass: Pass | None) -> Pass:
    assert a_pass is not None
    return a_pass


def slices_of(a_pass: Pass | None) -> list[Slice]:
    return [piece for batch in must(a_pass).micro_batches for piece in batch.slices]


def requests_of(a_pass: Pass | None) -> list[int]:
    return [piece.request for piece in slices_of(a_pass)]


def give_back(scheduler: Scheduler, a_pass: Pass | None, token: int = 2) -> Update:
    """Return the pass, `token` being drawn wherever one is asked for."""
    asked = [piece.request for piece in slices_of(a_pass) if piece.sampling is not None]
    return scheduler.update(must(a_pass), [Sample(i, token, None, ()) for i in asked])


def test_a_decode_follows_the_pass_that_draws_its_token() -> None:
    scheduler = make_scheduler()
    request = make_request(0)
    scheduler.add(request)
    first, second = must(scheduler.schedule()), must(scheduler.schedule())
    assert first.follows is None
    assert second.follows == first.step
    [piece] = slices_of(second)
    assert (piece.start, piece.tokens, piece.follows) == (4, (FOLLOWS,), True)
    assert piece.sampling is not None
    assert piece.sampling.history == (1, 1, 1, 1)  # the stage adds what it drew
    assert scheduler.schedule() is None  # a request is in two passes at most
    give_back(scheduler, first, 5)
    third = must(scheduler.schedule())
    [piece] = slices_of(third)
    assert (piece.start, piece.tokens, third.follows) == (5, (FOLLOWS,), second.step)
    assert piece.sampling is not None
    assert piece.sampling.history == (1, 1, 1, 1, 5)
    give_back(scheduler, second, 6)
    give_back(scheduler, third, 7)
    assert request.output == [5, 6, 7]
    last = must(scheduler.schedule())
    assert (slices_of(last)[0].tokens, last.follows) == ((7,), None)


def test_a_request_whose_last_token_is_being_drawn_is_not_scheduled() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request(0, max_tokens=1))
    scheduler.add(make_request(1, max_tokens=2))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert requests_of(first) == [0, 1]
    assert requests_of(second) == [1]
    assert scheduler.schedule() is None
    assert [r.request_id for r in give_back(scheduler, first).finished] == [0]
    assert [r.request_id for r in give_back(scheduler, second).finished] == [1]
    assert not scheduler.has_work


def test_the_next_chunk_of_a_prompt_needs_no_token_of_the_one_before() -> None:
    scheduler = make_scheduler(token_budget=64)
    request = make_request(0, prompt=150)
    scheduler.add(request)
    first, second = must(scheduler.schedule()), must(scheduler.schedule())
    assert [(p.start, p.end) for p in slices_of(first) + slices_of(second)] == [(0, 64), (64, 128)]
    assert second.follows is None
    assert scheduler.schedule() is None
    give_back(scheduler, first)
    third = must(scheduler.schedule())
    [piece] = slices_of(third)
    assert (piece.start, piece.end, third.follows) == (128, 150, None)
    assert piece.sampling is not None


def test_a_token_whose_mask_depends_on_the_one_before_is_not_asked_for_ahead() -> None:
    scheduler = make_scheduler(token_budget=64)
    bound, free = make_request(0, prompt=100), make_request(1)
    bound.mask = b"first"
    for request in (bound, free):
        scheduler.add(request)
    first, second = scheduler.schedule(), scheduler.schedule()
    # The rest of its prompt may follow: the mask of its first token is known.
    assert (slices_of(first)[0].end, requests_of(second)) == (64, [0, 1])
    assert [piece.sampling.mask for piece in slices_of(second) if piece.sampling] == [b"first", b""]
    give_back(scheduler, first)
    assert requests_of(third := scheduler.schedule()) == [1]
    give_back(scheduler, second)
    bound.mask = b"second"
    [piece] = [piece for piece in slices_of(scheduler.schedule()) if piece.request == 0]
    assert (piece.start, piece.follows) == (100, False)
    assert piece.sampling is not None and piece.sampling.mask == b"second"
    assert slices_of(third)[0].follows


@pytest.mark.parametrize("how", ["stop", "finish", "abort"])
def test_a_slice_too_many_is_ignored_and_keeps_the_pages_until_it_is_back(how: str) -> None:
    scheduler = make_scheduler(num_pages=4)
    request = make_request(0, prompt=PAGE_TOKENS)
    scheduler.add(request)
    first, second = scheduler.schedule(), scheduler.schedule()
    update = give_back(scheduler, first, EOS if how == "stop" else 5)
    assert len(update.finished) == (how == "stop")
    third = None
    if how != "stop":
        third = scheduler.schedule()
        scheduler.abort(0) if how == "abort" else scheduler.finish(0, FinishReason.STOP, 1)
    assert request.num_output == 1
    assert scheduler.schedule() is None and scheduler.has_work
    for a_pass in filter(None, (second, third)):
        assert scheduler.pool.num_free == 2
        update = give_back(scheduler, a_pass)
        assert (update.committed, update.finished) == ([], [])
    assert request.num_output == 1
    assert scheduler.pool.num_free == 4 and not scheduler.has_work


def test_every_group_has_its_pass_before_one_is_made_ahead() -> None:
    scheduler = make_scheduler(passes_in_flight=2)
    for i in range(4):
        scheduler.add(make_request(i))
    passes = [scheduler.schedule() for _ in range(3)]
    assert [requests_of(a_pass) for a_pass in passes] == [[0, 1], [2, 3], [0, 1]]
    assert scheduler.schedule() is None
    for follower in ([2, 3], [0, 1], [2, 3]):
        oldest = must(passes.pop(0))
        give_back(scheduler, oldest)
        passes.append(scheduler.schedule())
        assert requests_of(passes[-1]) == follower
        assert must(passes[-1]).follows == must(passes[0]).step


def test_few_requests_are_in_a_pass_ahead_all_the_same() -> None:
    scheduler = make_scheduler(passes_in_flight=3)
    scheduler.add(make_request(0))
    passes = [scheduler.schedule() for _ in range(3)]
    assert [requests_of(a_pass) for a_pass in passes[:2]] == [[0], [0]]
    assert passes[2] is None


def test_a_victim_in_flight_goes_when_it_is_back_and_keeps_what_it_drew() -> None:
    scheduler = make_scheduler(num_pages=4)
    old = make_request(0, prompt=PAGE_TOKENS - 2, max_tokens=20)
    young = make_request(1, prompt=PAGE_TOKENS + 20, max_tokens=20)
    for request in (old, young):
        scheduler.add(request)
    passes = [scheduler.schedule(), scheduler.schedule()]
    taken = scheduler.pool.allocate(scheduler.pool.num_free)  # somebody else's for a while
    give_back(scheduler, passes.pop(0))
    passes.append(scheduler.schedule())
    give_back(scheduler, passes.pop(0))
    assert scheduler.schedule() is None  # `old` needs a page, and `young` has been told to go
    assert (young.num_output, len(young.pages), scheduler.num_preemptions) == (2, 2, 0)
    give_back(scheduler, passes.pop())
    assert (young.num_output, young.pages, scheduler.num_preemptions) == (3, [], 1)
    assert requests_of(scheduler.schedule()) == [0]
    scheduler.pool.free(taken)
    scheduler.abort(0)
    [piece] = slices_of(scheduler.schedule())
    # Nobody has taken its full page meanwhile.
    assert (piece.request, piece.start, piece.end) == (1, PAGE_TOKENS, len(young.tokens))
