"""The one thread that works on a stage's device, while others see to what comes and goes."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from headrace.scheduler.errors import StageError

T = TypeVar("T")


class StageThread:
    """Does what it is given in turn, and passes in the order of their steps, from 1 on.

    Calls of an actor start in order, but on several threads, of which one may overtake another.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stage")
        self._turn = threading.Condition()
        self._next = 1

    def begin_at(self, step: int) -> None:
        """The next pass that will come is `step`: on a stage that joins later, or after passes that were
        broken off, which fail if they come now."""
        with self._turn:
            self._next = step
            self._turn.notify_all()

    def do(self, work: Callable[..., T], *arguments: Any) -> T:
        """What `work` returns or raises."""
        return self._thread.submit(work, *arguments).result()

    def run(self, step: int, deadline: float, work: Callable[[], T]) -> T:
        """`do` the work of a pass. StageError when the one before does not come in `deadline` seconds."""
        with self._turn:
            if not self._turn.wait_for(lambda: self._next >= step, deadline):
                raise StageError(f"pass {step} came, and pass {self._next} did not")
            if self._next > step:
                raise StageError(f"pass {step} was broken off")
            future = self._thread.submit(work)
            self._next += 1
            self._turn.notify_all()
        return future.result()
