"""Brings a ring back together after a stage died, hung, or lost touch with its neighbours.

Survivors stay: they give up what was under way and keep their weights, their KV pages and their graphs.
Stages that are gone, or that do not answer, get new processes, which read their layers again. Then all
edges form anew, in another epoch. Whatever dies meanwhile is found in the next round.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial

import ray

from headrace.cluster.members import Members, Place
from headrace.cluster.recovered import Recovery
from headrace.cluster.stage_actor import CONTROL
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer
from headrace.scheduler.errors import HeadraceError, StageError, StageLostError

log = logging.getLogger(__name__)

BREAK_OFF_SECONDS = 30.0
"""How long stages may take to give up a pass: a kernel may be under way, or a large read."""

ROUNDS = 6
"""How often a ring is brought together at least before it is given up; pauses between two double from a second
on."""

LONGEST_PAUSE = 16.0

OUTAGE_SECONDS = 600.0
"""How long it is tried at least: links and nodes that are back after some minutes are waited for."""

FAILURES_HERE = 2
"""How often a new process may fail to start or to load in one place before another node is tried."""

FAILURES = 5
"""How often it may fail for a reason that is not its death, as a file that cannot be read."""


class StageState(Enum):
    SERVING = "serving"  # passes come and go
    BREAKING = "breaking off"  # was told to give up what is under way
    RESTING = "resting"  # holds weights and pages, has no edges
    GONE = "gone"  # its process has ended, or was ended because it did not answer
    STARTING = "starting"  # a new process starts and reads its layers


LEGAL: Mapping[StageState, frozenset[StageState]] = {
    StageState.SERVING: frozenset({StageState.BREAKING}),
    # Also of a stage that dies, or is only now found to be dead.
    StageState.BREAKING: frozenset({StageState.RESTING, StageState.GONE}),
    # Edges have formed, or somebody died while they did.
    StageState.RESTING: frozenset({StageState.SERVING, StageState.BREAKING}),
    StageState.GONE: frozenset({StageState.STARTING}),
    # Its layers are there, or something failed and the next round asks what is.
    StageState.STARTING: frozenset({StageState.RESTING, StageState.BREAKING}),
}
"""Each state's next ones."""


@dataclass(frozen=True, slots=True)
class StageStanding:
    """What a stage's process does since so many seconds, where it is, and the name of its ring in metrics."""

    state: StageState
    seconds: float
    place: Place
    ring: str


class RingRecovery:
    """Recovers the ring of `members`."""

    def __init__(self, members: Members, pause: Callable[[float], None] = time.sleep) -> None:
        self._members, self._processes, self._pause = members, members.processes, pause
        self._states = [StageState.SERVING] * len(members.configs)
        self._since = [time.monotonic()] * len(members.configs)
        self._failures: Counter[int] = Counter()

    def pids(self) -> list[int]:
        """Of the stages' processes, on the node where each is."""
        return self._members.pids()

    def check(self) -> None:
        """StageLostError when stages were not heard of for too long. Now and then, while nothing runs."""
        self._members.check()

    @property
    def states(self) -> list[StageState]:
        """Each stage's."""
        return list(self._states)

    def roster(self) -> list[StageStanding]:
        """Of each stage. Any thread may ask, and while stages are recovered, too."""
        now = time.monotonic()
        pairs = list(zip(self._states, self._since, strict=True))
        return [
            StageStanding(state, now - since, self._members.place(stage), self._members.ring)
            for stage, (state, since) in enumerate(pairs)
        ]

    def recover(self, error: StageLostError, step: int, tracer: Tracer = NULL_TRACER) -> Recovery:
        """Have every stage ready to run pass `step`, with edges to the others; phases are spans of `tracer`.

        The stages of the result hold nothing for any request. The `error` comes out again, with what came
        between, when that cannot be had; NoPlaceError where there is no place for all.
        """
        phases: dict[str, float] = {}
        replaced, last = set[int](), error
        self._failures.clear()
        end, number = time.monotonic() + OUTAGE_SECONDS, 0
        while number < ROUNDS or time.monotonic() < end:
            number += 1
            if number > 1:
                self._pause(min(LONGEST_PAUSE, 2.0 ** (number - 2)))
            try:
                self._round(step, last.silent, replaced, _Phases(phases, tracer))
            except StageLostError as failure:
                log.warning("recovering from: %s Round %d: %s", error, number, failure)
                last = failure
                continue
            return Recovery(str(error), tuple(sorted(replaced)), number, phases)
        raise StageError(f"{error} It could not be recovered from in {number} rounds: {last}")

    def _round(
        self, step: int, silent: Collection[int], replaced: set[int], phases: "_Phases"
    ) -> None:
        with phases.timed("breaking off"):
            self._break_off(step, silent)
        gone = self._in_state(StageState.GONE)
        replaced.update(gone)
        if gone:
            with phases.timed("starting"):
                self._start(gone)
            with phases.timed("loading"):
                self._of_each(gone, lambda stage: self._try(stage, partial(self._load, step=step)))
                for stage in gone:
                    self._enter(stage, StageState.RESTING)
        with phases.timed("connecting"):
            self._members.connect()
        for stage in self._in_state(StageState.RESTING):
            self._enter(stage, StageState.SERVING)

    def _break_off(self, step: int, silent: Collection[int]) -> None:
        """Have everybody rest who answers; the others are gone, and their processes ended."""
        for stage in range(len(self._states)):
            self._enter(stage, StageState.BREAKING)
        for stage in silent:
            self._end(stage)
        asked = {
            self._processes.actors[stage]
            .break_off.options(concurrency_group=CONTROL)
            .remote(step): stage
            for stage in self._in_state(StageState.BREAKING)
        }
        for stage in self._late(asked):
            self._end(stage)

    def _late(self, asked: Mapping[ray.ObjectRef, int]) -> list[int]:
        """Notes who answers. The others have had their time.

        A call may be kept back by an earlier one of the same stage, which waits for tokens that another
        stage draws. So the stage that embeds has time after the others, too.
        """
        waiting = list(asked)
        first = self._members.configs[0].plan.placement.first_stage
        while waiting:
            done, left = ray.wait(waiting, num_returns=1, timeout=BREAK_OFF_SECONDS)
            for ref in done:
                self._answered(asked[ref], ref)
            if not done:
                late = [asked[ref] for ref in left]
                if late == [first] or first not in late:
                    return late
                for stage in late:
                    if stage != first:
                        self._end(stage)
                left = [ref for ref in left if asked[ref] == first]
            waiting = left
        return []

    def _answered(self, stage: int, ref: ray.ObjectRef) -> None:
        try:
            if ray.get(ref):
                self._enter(stage, StageState.RESTING)
                return
        except (ray.exceptions.RayError, HeadraceError) as error:
            log.info("stage %d: %s", stage, str(error).splitlines()[0])
        self._end(stage)

    def _end(self, stage: int) -> None:
        self._processes.stop(self._processes.actors[stage])
        self._enter(stage, StageState.GONE)

    def _start(self, gone: Collection[int]) -> None:
        self._processes.await_places()
        for stage in gone:
            self._enter(stage, StageState.STARTING)
            self._members.leave_log(stage)
            node = self._other_place(stage)
            self._members.seat(stage, self._processes.start(stage, node), node)
        self._of_each(gone, lambda stage: self._try(stage, self._open))

    def _other_place(self, stage: int) -> str | None:
        """The id of a node that has room, where new processes have failed again and again in the stage's own place: its
        GPU or its drive may be what is broken. None for that place."""
        if not self._failures[stage] or self._failures[stage] % (2 * FAILURES_HERE) < FAILURES_HERE:
            return None
        node = self._processes.spare_node(self._processes.bundle_node(stage))
        if node is not None:
            log.warning(
                "stage %d failed %d times: it starts on node %s", stage, self._failures[stage], node
            )
        return node

    def _try(self, stage: int, work: Callable[[int], None]) -> None:
        """StageLostError also for what only this place may lack; what is the matter everywhere comes out at last."""
        try:
            work(stage)
        except HeadraceError as error:
            self._failures[stage] += 1
            if isinstance(error, StageLostError) or self._failures[stage] >= FAILURES:
                raise
            raise StageLostError(f"stage {stage}: {error}") from error

    def _open(self, stage: int) -> None:
        self._members.open(stage, self._processes.actors[stage], f"replacing stage {stage}")

    def _load(self, stage: int, step: int) -> None:
        actor = self._processes.actors[stage]
        self._members.load(stage, actor, step, f"replacing stage {stage}")
        self._members.open_log(stage)

    @staticmethod
    def _of_each(stages: Collection[int], work: Callable[[int], None]) -> None:
        """Do it for all at once; the first error comes out when all have ended."""
        with ThreadPoolExecutor(len(stages)) as threads:
            list(threads.map(work, stages))

    def _in_state(self, state: StageState) -> list[int]:
        return [stage for stage, each in enumerate(self._states) if each is state]

    def _enter(self, stage: int, state: StageState) -> None:
        before = self._states[stage]
        assert state in LEGAL[before], f"stage {stage}: {before.value} -> {state.value}"
        self._states[stage], self._since[stage] = state, time.monotonic()
        log.info("stage %d is %s", stage, state.value)


@dataclass(frozen=True, slots=True)
class _Phases:
    """Seconds by phase, summed up over rounds."""

    seconds: dict[str, float]
    tracer: Tracer

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            with self.tracer.span(Kind.RECOVERY, name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
