"""Which slices carry how many drafts, and what becomes of them."""

from dataclasses import replace

import pytest

from headrace.scheduler.config import DraftLimits, SchedulerConfig
from headrace.scheduler.plan import Pass, Sample, Slice
from headrace.scheduler.request import FinishReason, Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.speculation import num_accepted
from headrace.scheduler.update import Update

CONFIG = SchedulerConfig(
    num_pages=20,
    max_context=1000,
    token_budget=256,
    max_sequences=16,
    micro_batches=1,
    micro_batch_tokens=256,
    drafts=DraftLimits(most=8, most_tokens=256),
)
CIRCLE = [11, 12, 13, 14, 15]


def begun(
    config: SchedulerConfig, prompt: int, max_tokens: int = 300, **params: object
) -> Scheduler:
    """A request that goes round in a circle, and is sure of its drafts."""
    scheduler = Scheduler(config)
    tokens = (CIRCLE * prompt)[:prompt]
    wish = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    scheduler.add(Request(0, tokens, wish, seed=0, stop_ids=frozenset({9})))
    return scheduler


def the_slice(a_pass: Pass | None) -> Slice:
    assert a_pass is not None
    [piece] = [piece for batch in a_pass.micro_batches for piece in batch.slices]
    return piece


def answer(
    scheduler: Scheduler, a_pass: Pass | None, wrong_at: int = 99, token: int = 90
) -> Update:
    """Go on round the circle, but for one of the drawn tokens."""
    piece = the_slice(a_pass)
    first = piece.known_end
    drawn = [CIRCLE[(first + i) % 5] for i in range(piece.num_drawn)]
    if wrong_at < len(drawn):
        drawn[wrong_at] = token
    count = 1 + num_accepted(piece.drafts, drawn)
    samples = [Sample(0, token, None, ()) for token in drawn[:count]]
    assert a_pass is not None
    return scheduler.update(a_pass, samples)


def test_what_was_guessed_rightly_is_computed_and_no_more() -> None:
    scheduler = begun(CONFIG, 20)
    first = scheduler.schedule()
    piece = the_slice(first)
    assert (piece.start, piece.num_drafts, piece.drafts) == (0, 4, (11, 12, 13, 14))
    assert [sample.token for _, sample in answer(scheduler, first, wrong_at=2).committed] == [
        11,
        12,
        90,
    ]
    piece = the_slice(second := scheduler.schedule())
    assert (piece.start, piece.tokens, piece.num_drafts) == (22, (90,), 0)  # 90 was never there
    update = answer(scheduler, second)
    assert len(update.committed) == 1
    counts = scheduler.speculation.counts
    assert (counts.decodes, counts.tokens, counts.drafts, counts.accepted) == (2, 4, 4, 2)
    assert (counts.tokens_a_pass, counts.acceptance) == (2.0, 0.5)


@pytest.mark.parametrize(("quantized", "drafts"), [(True, 3), (False, 4)])
def test_no_draft_fills_a_page_that_is_quantized_then(quantized: bool, drafts: int) -> None:
    config = replace(CONFIG, num_tails=4 if quantized else 0)
    scheduler = begun(config, 60)
    piece = the_slice(scheduler.schedule())
    assert (piece.end - piece.num_drafts, piece.num_drafts) == (60, drafts)
    assert len(piece.pages) == 1


def test_drafts_take_no_page_from_anybody() -> None:
    scheduler = Scheduler(replace(CONFIG, num_pages=3, max_context=190, num_tails=4))
    for number, tokens in enumerate((list(range(100, 164)), (CIRCLE * 20)[:63])):
        wish = SamplingParams(max_tokens=40)
        scheduler.add(Request(number, tokens, wish, seed=0))

    def drafted() -> tuple[Slice, Pass]:
        a_pass = scheduler.schedule()
        assert a_pass is not None
        [piece] = [p for batch in a_pass.micro_batches for p in batch.slices if p.request == 1]
        return piece, a_pass

    piece, a_pass = drafted()
    assert (piece.known_end, piece.num_drafts) == (63, 0)
    scheduler.update(a_pass, [Sample(0, 5, None, ()), Sample(1, 14, None, ())])
    piece, a_pass = drafted()
    assert (piece.known_end, piece.num_drafts, len(piece.pages)) == (64, 0, 1)
    scheduler.abort(0)
    scheduler.update(a_pass, [Sample(0, 6, None, ()), Sample(1, 15, None, ())])
    piece, a_pass = drafted()
    assert (piece.known_end, len(piece.pages)) == (65, 2) and piece.num_drafts > 0


def test_a_request_ends_within_what_was_guessed() -> None:
    scheduler = begun(CONFIG, 20, max_tokens=3)
    piece = the_slice(a_pass := scheduler.schedule())
    assert piece.num_drafts == 2  # nothing is guessed behind its last token
    update = answer(scheduler, a_pass)
    [request] = update.finished
    assert (request.output, request.finish_reason) == ([11, 12, 13], FinishReason.LENGTH)
    scheduler = begun(CONFIG, 20)
    scheduler._roster.live[0].stop_ids = frozenset({12})
    update = answer(scheduler, scheduler.schedule())
    [request] = update.finished
    assert (request.output, request.finish_reason) == ([11, 12], FinishReason.STOP)
    assert len(update.committed) == 2


def test_a_pass_has_no_more_tokens_and_no_fewer_than_are_free() -> None:
    few = replace(CONFIG, drafts=replace(CONFIG.drafts, most_tokens=22))
    assert the_slice(begun(few, 20).schedule()).num_drafts == 2
    many = replace(CONFIG, drafts=replace(CONFIG.drafts, least_tokens=21))
    assert the_slice(begun(many, 20).schedule()).num_drafts == 0
    small = replace(CONFIG, micro_batch_tokens=21)
    assert the_slice(begun(small, 20).schedule()).num_drafts == 1


def test_passes_are_made_ahead_until_drafts_are_worth_waiting_for() -> None:
    config = replace(CONFIG, ahead=1, drafts=replace(CONFIG.drafts, least_gain=1.0))
    scheduler = begun(config, 20)
    made, ahead = [scheduler.schedule()], 0
    while the_slice(made[0]).num_drafts == 0:
        following = scheduler.schedule()
        if following is not None:
            assert the_slice(following).follows and following.follows is not None
            made.append(following)
            ahead += 1
        answer(scheduler, made.pop(0))
        made = made or [scheduler.schedule()]
    assert ahead > 3
    assert scheduler.schedule() is None, "its next token is not known"
    assert len(answer(scheduler, made[0]).committed) > 3
