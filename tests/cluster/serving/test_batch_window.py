"""The first pass of an idle ring is held for others to join, with real passes."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import wait_for
from served import EchoEngine, Served, serving, stories_engine

from headrace.cluster.engine import Engine
from headrace.cluster.serving.generation import Generation, Order
from headrace.cluster.serving.loop import EngineLoop, News
from headrace.scheduler.batch_window import BatchWindow
from headrace.scheduler.request import SamplingParams

TOKENS = 4


@pytest.fixture(scope="module")
def engine(stories: Path) -> Iterator[Engine]:
    with stories_engine(stories) as made:
        yield made


class Asking:
    """A loop, and what it has answered by the number of the request."""

    def __init__(self, engine: Any, window: BatchWindow) -> None:
        self.engine, self.window = engine, window
        self.begun, self.answers = set[int](), dict[int, list[int]]()
        self.loop = EngineLoop(engine, self._hear, lambda error: None, window=window)

    def _hear(self, news: list[News]) -> None:
        for each in news:
            number = each.generation.orders[0].seed
            self.begun.add(number)
            if each.completion is not None:
                self.answers[number] = each.completion.token_ids

    def ask(self, number: int, max_tokens: int = TOKENS, **given: Any) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.loop.submit(Generation([Order([5, 6, 7, 20 + number], params, number)], **given))

    def wait(self, number: int) -> None:
        wait_for(lambda: number in self.answers, 30.0, lambda: f"no answer to {number}")

    def passes(self, apart: Sequence[float], max_tokens: int = TOKENS) -> int:
        """How many it takes to answer requests that come so many seconds after one another."""
        before, numbers = self.engine.stats.passes, range(len(apart))
        self.answers.clear()
        for number in numbers:
            time.sleep(apart[number])
            self.ask(number, max_tokens)
        for number in numbers:
            self.wait(number)
        return int(self.engine.stats.passes) - before


@contextmanager
def asking(engine: Any, window: BatchWindow) -> Iterator[Asking]:
    made = Asking(engine, window)
    made.loop.start()
    try:
        yield made
    finally:
        made.loop.close()


def test_those_who_come_within_the_window_share_all_passes(engine: Engine) -> None:
    apart = [0.0, 0.02, 0.02]
    with asking(engine, BatchWindow(1.0)) as held:
        assert held.passes(apart) == TOKENS
        assert (held.window.passes, held.window.joined) == (1, 2)
    with asking(engine, BatchWindow(0.0)) as at_once:
        assert at_once.passes(apart) > TOKENS
        assert (at_once.window.passes, at_once.window.joined) == (0, 0)
    assert held.answers == at_once.answers


def test_by_default_a_pass_is_held_for_a_part_of_what_it_takes(engine: Engine) -> None:
    with asking(EchoEngine(engine.tokenizer, pace=1.0), BatchWindow()) as one:
        assert one.passes([0.0], 1) == 1
        assert one.window.passes == 0  # nothing was known of passes
        assert one.passes([0.0, 0.01], 1) == 1
        assert (one.window.passes, one.window.joined) == (1, 1)
        assert one.passes([0.0, 0.5], 1) == 2


def test_short_passes_are_not_held_by_default(engine: Engine) -> None:
    with asking(EchoEngine(engine.tokenizer, pace=0.005), BatchWindow()) as one:
        for _ in range(3):
            one.passes([0.0])
        assert one.window.passes == 0


def test_who_comes_while_others_run_is_not_held(engine: Engine) -> None:
    with asking(engine, BatchWindow(20.0)) as one:
        one.ask(0, 100, begin_by=0.0)
        wait_for(lambda: 0 in one.begun, 30.0, lambda: "it did not begin")
        one.ask(1, 1)
        one.wait(1)
        assert 0 not in one.answers
        one.wait(0)
        assert one.window.passes == 0


def test_a_window_in_which_all_went_away_leaves_an_idle_loop(engine: Engine) -> None:
    with asking(engine, BatchWindow(20.0)) as one:
        generation = Generation([Order([5, 6], SamplingParams(max_tokens=2), 0)])
        passes = engine.stats.passes
        one.loop.submit(generation)
        wait_for(lambda: one.loop.state.held_until is not None, 10.0, lambda: "not held")
        one.loop.abort(generation)
        wait_for(lambda: one.loop.state.held_until is None, 10.0, lambda: "still held")
        assert (engine.stats.passes, one.loop.state.windows) == (passes, 0)
        one.ask(1, begin_by=0.0)
        one.wait(1)


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    with serving(engine, batch_window=5.0) as made:
        yield made


def complete(served: Served, **given: Any) -> float:
    """Seconds that it took."""
    started = time.monotonic()
    body = {"model": "stories", "prompt": "Once", "max_tokens": 2, **given}
    status, answer, _ = served.ask("POST", "/v1/completions", body)
    assert status == 200, answer
    return time.monotonic() - started


def test_a_deadline_ends_the_window_for_all(served: Served) -> None:
    # Nothing has been measured, so that nobody with a time is held.
    assert complete(served, max_ttft_ms=4000) < 3.0
    assert served.metric("headrace_batch_windows_total") == 0
    took = list[float]()
    patient = threading.Thread(target=lambda: took.append(complete(served)))
    patient.start()
    time.sleep(0.2)
    assert complete(served, max_ttft_ms=2000) < 4.0  # its first token within 2 s, or it is a 504
    patient.join(30.0)
    assert took[0] < 4.0
    assert served.metric("headrace_batch_windows_total") == 1
    assert served.metric("headrace_batch_window_joined_total") == 1
