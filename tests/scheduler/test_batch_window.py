"""When the first pass of an idle ring begins, on a clock that is moved by hand."""

import math
from dataclasses import replace

import pytest

from headrace.scheduler.batch_window import LONGEST, MOST, SHARE, BatchWindow, Gathered
from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.request import Priority, Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler

LIMITS = SchedulerConfig(
    num_pages=64,
    max_context=512,
    token_budget=128,
    max_sequences=8,
    micro_batches=2,
    micro_batch_tokens=64,
)
ONE = Gathered(sequences=1, tokens=4)


def left(window: BatchWindow, now: float, gathered: Gathered = ONE, **given: float) -> float:
    return window.left(now, gathered, LIMITS, given.pop("pass_seconds", 1.0), **given)


def test_a_window_is_a_small_part_of_the_pass() -> None:
    window = BatchWindow()
    assert window.length(1.0) == SHARE
    assert window.length(60.0) == MOST
    assert window.length(0.005) == 0.0  # of a resident model: nothing to be measured
    assert window.length(0.0) == 0.0  # nothing is known yet
    assert BatchWindow(0.3).length(0.005) == 0.3
    assert BatchWindow(0.0).length(60.0) == 0.0


@pytest.mark.parametrize("seconds", [-0.1, LONGEST + 1, math.inf, math.nan])
def test_windows_of_a_mistaken_unit_are_refused(seconds: float) -> None:
    with pytest.raises(HeadraceError, match="--batch-window must be from 0 to 60 s"):
        BatchWindow(seconds)


def test_it_is_over_when_its_time_is_and_stays_so_until_a_pass_begins() -> None:
    window = BatchWindow(0.1)
    assert left(window, 5.0) == pytest.approx(0.1)
    assert window.until == pytest.approx(5.1)
    two = Gathered(sequences=2, tokens=8)
    assert left(window, 5.06, two) == pytest.approx(0.04)  # whoever joins makes it no longer
    assert left(window, 5.1, two) == left(window, 5.2, two) == 0.0
    window.begin()
    assert (window.passes, window.joined, window.until) == (1, 1, None)
    assert left(window, 9.0) == pytest.approx(0.1)


def test_it_ends_when_nobody_else_has_a_place() -> None:
    window = BatchWindow(0.1)
    assert left(window, 0.0, Gathered(7, 127)) > 0.0
    assert left(window, 0.0, Gathered(8, 8)) == 0.0
    assert left(window, 0.0, Gathered(1, 128)) == 0.0
    two_passes = replace(LIMITS, passes_in_flight=2)
    assert window.left(0.0, Gathered(8, 128), two_passes, 1.0) > 0.0
    tails = replace(two_passes, num_tails=6)
    assert window.left(0.0, Gathered(6, 6), tails, 1.0) == 0.0


def test_it_ends_when_a_deadline_would_be_missed() -> None:
    window = BatchWindow(0.1)
    assert left(window, 3.0, begin_by=3.02) == pytest.approx(0.02)
    assert left(window, 3.02, begin_by=3.02) == 0.0
    window.begin()
    assert left(window, 4.0, begin_by=3.9) == 0.0
    window.begin()
    assert window.passes == 1  # the second one was not held


def test_a_window_in_which_all_went_away_began_nothing() -> None:
    window = BatchWindow(0.1)
    left(window, 1.0)
    window.close()
    assert (window.passes, window.until) == (0, None)
    assert left(window, 2.0) == pytest.approx(0.1)


def test_the_longer_the_pass_has_become_the_longer_is_the_window() -> None:
    window = BatchWindow()
    assert left(window, 0.0, pass_seconds=0.4) == pytest.approx(0.02)
    assert left(window, 0.01, Gathered(2, 90), pass_seconds=0.8) == pytest.approx(0.03)


def a_request(number: int, priority: Priority = Priority.INTERACTIVE) -> Request:
    params = SamplingParams(max_tokens=4)
    return Request(number, [5, 6, 7], params, seed=0, priority=priority)


def test_only_those_who_have_never_run_are_gathered() -> None:
    scheduler = Scheduler(LIMITS)
    assert scheduler.gathered is None
    scheduler.add(a_request(1))
    scheduler.add(a_request(2, Priority.BATCH))
    assert scheduler.gathered == Gathered(sequences=2, tokens=6)
    scheduler.abort(2)
    assert scheduler.gathered == Gathered(sequences=1, tokens=3)
    a_pass = scheduler.schedule()
    assert a_pass is not None
    assert scheduler.gathered is None
    scheduler.add(a_request(3))
    # Stages were lost: 1 is to be computed again, and has waited enough.
    scheduler.abandon([a_pass])
    scheduler.lose(scheduler.contexts())
    assert scheduler.num_running == 0
    assert scheduler.gathered is None
    scheduler.abort(1)
    assert scheduler.gathered == Gathered(sequences=1, tokens=3)
