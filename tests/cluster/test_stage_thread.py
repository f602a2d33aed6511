"""A stage's thread: one thing at a time, and passes in the order of their steps."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from headrace.cluster.stage_thread import StageThread
from headrace.scheduler.errors import StageError


def test_passes_run_in_the_order_of_their_steps_whichever_comes_first() -> None:
    thread, ran = StageThread(), list[int]()

    def work(step: int) -> Callable[[], int]:
        def run() -> int:
            ran.append(step)
            return threading.get_ident()

        return run

    with ThreadPoolExecutor(8) as calls:
        came = [calls.submit(thread.run, step, 60.0, work(step)) for step in (3, 2, 5, 4, 1)]
        idents = {call.result() for call in came}
    assert ran == [1, 2, 3, 4, 5]
    assert idents == {thread.do(threading.get_ident)}


def test_a_pass_that_fails_lets_the_next_one_run() -> None:
    thread = StageThread()

    def fail() -> None:
        raise StageError("edge 0 -> 1 broke")

    with pytest.raises(StageError, match="broke"):
        thread.run(1, 60.0, fail)
    assert thread.run(2, 60.0, lambda: "ran") == "ran"


def test_the_next_pass_is_taken_while_one_runs() -> None:
    thread, taken, go = StageThread(), threading.Event(), threading.Event()

    def first() -> bool:
        taken.set()
        return go.wait(60.0)

    with ThreadPoolExecutor(2) as calls:
        running: list[Future[bool]] = [calls.submit(thread.run, 1, 60.0, first)]
        assert taken.wait(60.0)
        running.append(calls.submit(thread.run, 2, 60.0, lambda: True))
        assert not any(call.done() for call in running)
        go.set()
        assert all(call.result() for call in running)


def test_a_pass_whose_predecessor_does_not_come_is_given_up() -> None:
    with pytest.raises(StageError, match="pass 2 came, and pass 1 did not"):
        StageThread().run(2, 0.01, lambda: None)
