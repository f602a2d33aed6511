"""What a stage fills in that was not known when a pass was made."""

import pytest

from headrace.runtime.drawn_tokens import DrawnTokens
from headrace.scheduler.errors import StageError
from headrace.scheduler.plan import (
    FOLLOWS,
    MicroBatch,
    Pass,
    PassResult,
    Sample,
    Sampling,
    Slice,
    StageTimes,
)

TIMES = StageTimes(0, 0.0, 0.0, 0.0, 0, 0)


def result(step: int, tokens: dict[int, int]) -> PassResult:
    samples = (Sample(request, token, None, ()) for request, token in tokens.items())
    return PassResult(step, tuple(samples), TIMES)


def how(history: tuple[int, ...]) -> Sampling:
    return Sampling(0.0, 0, 1.0, 0.0, 1.1, 0.0, 0.0, 5, None, 2, history)


def test_tokens_and_histories_are_completed() -> None:
    drawn = DrawnTokens(passes_in_flight=1)
    drawn.note(result(1, {7: 40, 8: 50}))
    known = Slice(3, 0, (1, 2, 3), (0,), None)
    plain = Slice(7, 9, (FOLLOWS,), (1,), how(()))
    penalized = Slice(8, 2, (FOLLOWS,), (2,), how((4, 5)))
    a_pass = Pass(2, (MicroBatch((known, plain)), MicroBatch((penalized,))), follows=1)
    first, second = drawn.complete(a_pass).micro_batches
    assert first.slices == (known, Slice(7, 9, (40,), (1,), how(())))
    assert second.slices == (Slice(8, 2, (50,), (2,), how((4, 5, 50))),)


def test_as_many_passes_are_remembered_as_can_be_followed() -> None:
    drawn = DrawnTokens(passes_in_flight=2)
    for step in (1, 2, 3):
        drawn.note(result(step, {0: 10 + step}))
        drawn.note(result(step, {}))  # of a stage that draws nothing
    for step in (2, 3):
        a_pass = Pass(4, (MicroBatch((Slice(0, 5, (FOLLOWS,), (0,), None),)),), follows=step)
        [batch] = drawn.complete(a_pass).micro_batches
        assert batch.slices[0].tokens == (10 + step,)


def test_a_pass_after_one_that_failed_fails() -> None:
    drawn = DrawnTokens(passes_in_flight=1)
    whole = Pass(5, (MicroBatch((Slice(0, 0, (1,), (0,), None),)),))
    assert drawn.complete(whole) is whole
    with pytest.raises(StageError, match="pass 6 follows pass 5, which failed"):
        drawn.complete(Pass(6, whole.micro_batches, follows=5))
