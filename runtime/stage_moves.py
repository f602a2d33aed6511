"""What goes on beside a stage's passes: moves of KV pages and loads of adapters."""

import time
from typing import TYPE_CHECKING

from headrace.runtime.adapters.loads import EndedLoads
from headrace.runtime.kv.moves import NONE_ENDED, Ended, PageMover
from headrace.runtime.ready import Ready
from headrace.scheduler.errors import StageLostError

if TYPE_CHECKING:
    from headrace.runtime.adapters.loader import AdapterLoader


class StageMoves:
    """Both of a stage, where it has room for them. They are numbered together, and outlast passes."""

    def __init__(
        self, stage: int, pages: PageMover | None, adapters: "AdapterLoader | None"
    ) -> None:
        self._stage, self._pages, self._adapters = stage, pages, adapters

    def begin(self, ready: Ready) -> None:
        """Copies out see what earlier passes wrote; beside this one they need not be waited for."""
        if ready.moves:
            assert self._pages is not None, "the plan has no host slots for pages"
            self._pages.begin(ready.moves)
        if ready.adapters:
            assert self._adapters is not None, "the plan has no slots for adapters"
            self._adapters.begin(ready.adapters)

    def wait(self, waiting: str, deadline: float) -> float:
        """Return when all that are under way have ended; seconds. StageLostError after `deadline` seconds."""
        named = ((self._pages, "moves of KV pages"), (self._adapters, "loads of adapters"))
        busy = [(who, what) for who, what in named if who is not None]
        if not busy:
            return 0.0
        started = time.perf_counter()
        for who, what in busy:
            if not who.wait(deadline):
                raise StageLostError(
                    f"stage {self._stage}: {what} that {waiting} waits for did not "
                    f"end within {deadline:.0f} s"
                )
        return time.perf_counter() - started

    def take(self) -> tuple[Ended, EndedLoads]:
        """What has ended since this was asked last."""
        moved = NONE_ENDED if self._pages is None else self._pages.take()
        return moved, EndedLoads() if self._adapters is None else self._adapters.take()
