"""What the stages of a ring record while somebody wants it, also across processes that are replaced."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import ray

from headrace.cluster.wire import decode
from headrace.runtime.trace import Trace

TRACE_SECONDS = 30.0
"""How long stages may take to finish the passes under way and hand over their traces."""

_PINGS = 8


@dataclass(frozen=True, slots=True)
class StageTrace:
    """What one process of a stage recorded; None where it is gone or did not answer. `left` says that another
    process has taken its place since."""

    stage: int
    trace: Trace | None
    left: bool = False


class TraceSource(Protocol):
    """Stages that can be recorded. One thread calls it."""

    def begin_trace(self, passes: int) -> None:
        """Have each stage record its newest `passes` passes; does not wait for the ones under way. Stages that
        do already go on."""

    def end_trace(self) -> Callable[[], list[StageTrace]]:
        """Nothing is recorded any more when the passes under way have ended. What is returned waits for that,
        in any thread, and has all that was recorded."""


class StageTraces:
    """Of stages that are Ray actors, of whose processes some may be replaced meanwhile."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)
        self._passes = 0  # of each stage, while they record
        self._left: list[StageTrace] = []
        self._leaving: set[int] = set()

    def begin_trace(self, passes: int) -> None:
        self._passes = passes
        self._left.clear()
        for actor in self._actors:
            actor.begin_trace.remote(passes)

    def end_trace(self) -> Callable[[], list[StageTrace]]:
        actors, left = list(self._actors), list(self._left)
        refs = [actor.end_trace.remote() for actor in actors]
        self._passes = 0

        def collect() -> list[StageTrace]:
            ray.wait(refs, num_returns=len(refs), timeout=TRACE_SECONDS)
            pairs = enumerate(zip(actors, refs, strict=True))
            return left + [StageTrace(i, _trace(actor, ref)) for i, (actor, ref) in pairs]

        return collect

    def leave(self, stage: int) -> None:
        """Keep what a stage's process recorded, which is about to end in good order."""
        if self._passes:
            actor = self._actors[stage]
            ref = actor.end_trace.remote()
            ray.wait([ref], timeout=TRACE_SECONDS)
            self._left.append(StageTrace(stage, _trace(actor, ref), left=True))
            self._leaving.add(stage)

    def replace(self, stage: int, actor: Any) -> None:
        """Another process has the stage's place. What one that did not `leave` had recorded is lost."""
        if self._passes:
            if stage not in self._leaving:
                self._left.append(StageTrace(stage, None, left=True))
            actor.begin_trace.remote(self._passes)
        self._leaving.discard(stage)
        self._actors[stage] = actor


def _trace(actor: Any, ref: Any) -> Trace | None:
    try:
        payload = ray.get(ref, timeout=1.0)
        if payload is None:
            return None
        trace = decode(payload, Trace)
        if trace.node == os.uname().nodename:
            return trace
        uncertain, ahead = min(_ping(actor) for _ in range(_PINGS))
        return replace(trace, ahead=ahead, uncertain=uncertain)
    except ray.exceptions.RayError:
        return None


def _ping(actor: Any) -> tuple[int, int]:
    """How far an actor's clock is ahead of this one, after the error of that (half the way there
    and back); in nanoseconds."""
    asked = time.time_ns()
    there = ray.get(actor.clock.remote(), timeout=TRACE_SECONDS)
    half = (time.time_ns() - asked) // 2
    return half, there - asked - half
