"""What a stage fills in that was not known when a pass was made."""

import pytest
import torch

from headrace.runtime.drawn_tokens import DrawnTokens, sampled_rows
from headrace.runtime.ready import ReadyBatch
from headrace.scheduler.errors import StageError
from headrace.scheduler.plan import (
    FOLLOWS,
    MicroBatch,
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


def ready(batch: MicroBatch) -> ReadyBatch:
    return ReadyBatch.build(batch, torch.device("cpu"))


def test_tokens_and_histories_are_completed() -> None:
    drawn = DrawnTokens(passes_in_flight=1)
    drawn.note(result(1, {7: 40, 8: 50}))
    known = Slice(3, 0, (1, 2, 3), (0,), None)
    plain = Slice(7, 9, (FOLLOWS,), (1,), how(()))
    penalized = Slice(8, 2, (FOLLOWS,), (2,), how((4, 5)))
    tokens = drawn.before(2, follows=1)
    for pieces, whole, rows in (
        ((known, plain), [1, 2, 3, 40], [(7, 10, how(()))]),
        ((penalized,), [50], [(8, 3, how((4, 5, 50)))]),
    ):
        batch = MicroBatch(pieces)
        made = ready(batch)
        made.complete(tokens)
        assert made.batch.tokens.tolist() == whole
        assert sampled_rows(batch, tokens) == rows


def test_as_many_passes_are_remembered_as_can_be_followed() -> None:
    drawn = DrawnTokens(passes_in_flight=2)
    for step in (1, 2, 3):
        drawn.note(result(step, {0: 10 + step}))
        drawn.note(result(step, {}))  # of a stage that draws nothing
    for step in (2, 3):
        assert drawn.before(4, follows=step) == {0: 10 + step}


def test_a_pass_after_one_that_failed_fails() -> None:
    drawn = DrawnTokens(passes_in_flight=1)
    assert drawn.before(5, follows=None) == {}
    with pytest.raises(StageError, match="pass 6 follows pass 5, which failed"):
        drawn.before(6, follows=5)
