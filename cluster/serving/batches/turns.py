"""Whose batch goes next: one of each tenant at a time, so that nobody waits for all of another's."""

import asyncio
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Turn:
    tenant: str
    given: asyncio.Event = field(default_factory=asyncio.Event)


class Turns:
    """At most `limit` turns at once. Of those who ask, the tenant whose last turn is longest ago is
    next. Runs on one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._active: set[str] = set()
        self._asking: list[Turn] = []
        self._last: dict[str, int] = {}
        self._count = 0

    def ask(self, tenant: str) -> Turn:
        turn = Turn(tenant)
        self._asking.append(turn)
        self._give()
        return turn

    def leave(self, turn: Turn) -> None:
        """Give a turn back, or ask for it no more."""
        if turn.given.is_set():
            self._active.remove(turn.tenant)
        else:
            self._asking.remove(turn)
        self._give()

    def _give(self) -> None:
        while len(self._active) < self._limit:
            ready = [turn for turn in self._asking if turn.tenant not in self._active]
            if not ready:
                return
            turn = min(ready, key=lambda each: self._last.get(each.tenant, -1))
            self._asking.remove(turn)
            self._active.add(turn.tenant)
            self._last[turn.tenant] = self._count
            self._count += 1
            turn.given.set()
