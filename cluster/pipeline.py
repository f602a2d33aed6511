"""A ring of stages seen from the engine: passes go in, results come out, in order.

Every Ray call of a running ring is made here; the engine and the scheduler know only `Pipeline`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import ray

from headrace.cluster.pass_bound import PassDeadline
from headrace.cluster.stage_actor import PASSES
from headrace.cluster.stage_traces import StageTrace, StageTraces
from headrace.cluster.wire import decode, encode
from headrace.scheduler.errors import HeadraceError, StageLostError
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan import Adapter, Pass, PassResult

if TYPE_CHECKING:  # seconds to import, and drivers of actors have no use
    from headrace.runtime.ready import Ready
    from headrace.runtime.stage import Stage

LOOK_SECONDS = 1.0
"""How often it is looked whether stages that are waited for are alive."""

DEATH_SECONDS = 2.0
"""How long after a broken edge Ray may take to know of the death that broke it."""

T = TypeVar("T")


class Pending(Protocol):
    def result(self) -> list[PassResult]:
        """One result a stage, when all have finished. StageError when any failed. May be asked again."""


class Pipeline(Protocol):
    def submit(self, a_pass: Pass) -> Pending:
        """Start a pass on every stage; returns at once. Stages run passes in submission order.

        It fails when the pass that it follows does; ask for the result of that one first.
        """

    def wait_host_tier(self) -> None:
        """Return when every stage has in host RAM what belongs there; passes need not wait for it."""

    def check_adapter(self, adapter: Adapter) -> None:
        """StoreError when it cannot be applied to some stage's layers; passes go on meanwhile."""

    def close(self) -> None: ...


def gather(
    refs: Sequence[Any],
    deadline: float,
    *,
    doing: str,
    first: int = 0,
    check: Callable[[], None] | None = None,
) -> list[Any]:
    """What one call on consecutive stages returned; `refs[0]` is stage `first`'s.

    StageLostError, naming the stage, when one died, failed or took more than `deadline` seconds; a
    HeadraceError that a stage raised comes out as it went in. `check` is called while they are waited
    for, and may raise.
    """
    waiting, end = list(refs), time.monotonic() + deadline
    while waiting:
        # One at a time, so that the first stage to fail is the one that is reported.
        left = end - time.monotonic()
        done, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, min(left, LOOK_SECONDS)))
        if not done:
            if left <= LOOK_SECONDS:
                late = tuple(first + i for i, ref in enumerate(refs) if ref in waiting)
                named = ", ".join(map(str, late))
                raise StageLostError(
                    f"{doing}: stage {named} did not answer within {deadline:.0f} s"
                )
            if check is not None:
                _check(check, doing)
            continue
        failure = _failure(done[0], first + refs.index(done[0]), doing)
        if isinstance(failure, StageLostError):
            raise _death(refs, first, doing) or failure
        if failure is not None:
            raise failure
    return list(ray.get(list(refs)))


def _check(check: Callable[[], None], doing: str) -> None:
    try:
        check()
    except StageLostError as error:
        raise StageLostError(f"{doing}: {error}", error.silent) from error


def _failure(ref: Any, stage: int, doing: str) -> HeadraceError | None:
    try:
        ray.get(ref)
    except ray.exceptions.RayActorError as error:
        return StageLostError(f"{doing}: stage {stage} died. {_reason(error)}")
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, HeadraceError):
            return error.cause
        return StageLostError(f"{doing}: stage {stage} failed: {error}")
    return None


def _death(refs: Sequence[Any], first: int, doing: str) -> HeadraceError | None:
    """A broken edge is the echo of a peer's death: the death, when there is one."""
    end, waiting = time.monotonic() + DEATH_SECONDS, list(refs)
    while waiting and (left := end - time.monotonic()) > 0:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=left)
        for ref in done:
            try:
                ray.get(ref)
            except ray.exceptions.RayActorError:
                return _failure(ref, first + refs.index(ref), doing)
            except ray.exceptions.RayTaskError:
                continue
    return None


def _reason(error: Exception) -> str:
    """The line of Ray's report that says how the process ended."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = [line for line in lines if "exit" in line.lower() or "memory" in line.lower()]
    return (found or lines)[0]


class _Draws(Generic[T]):
    """The results of the last visit's stage in the newest passes, as promises.

    The stage of the first visit needs them before the driver does, unless they are its own.
    """

    def __init__(self, plan: Plan) -> None:
        placement = plan.placement
        self._first, self._last = placement.first_stage, placement.last_stage
        self._results: deque[tuple[int, T]] = deque(maxlen=plan.passes_in_flight)

    def needed(self, a_pass: Pass, stage: int) -> T | None:
        """What `stage` has to be given for `a_pass`."""
        if a_pass.follows is None or stage != self._first or self._first == self._last:
            return None
        return dict(self._results)[a_pass.follows]

    def note(self, a_pass: Pass, results: Sequence[T]) -> None:
        self._results.append((a_pass.step, results[self._last]))


class _RayPending:
    def __init__(
        self,
        refs: list[Any],
        a_pass: Pass,
        deadline: PassDeadline,
        check: Callable[[], None] | None,
    ) -> None:
        self._refs, self._pass, self._deadline, self._check = refs, a_pass, deadline, check

    def result(self) -> list[PassResult]:
        seconds, doing = self._deadline.of(self._pass), f"pass {self._pass.step}"
        payloads = gather(self._refs, seconds, doing=doing, check=self._check)
        results = [decode(payload, PassResult) for payload in payloads]
        self._deadline.learn(self._pass, results)
        return results


class RayPipeline:
    """Stages that are Ray actors. One call per stage and pass; all stages get the same bytes.

    A result that another stage needs goes there from Ray to Ray: the call waits for it, and so do
    that actor's later ones.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        plan: Plan,
        deadline: float,
        check: Callable[[], None] | None = None,
    ) -> None:
        """No pass may take more than `deadline` seconds, or much more than those before it. `check` may raise
        StageLostError while a pass is waited for."""
        self._actors, self._most, self._check = list(actors), deadline, check
        self._deadline = PassDeadline(plan, deadline)
        self._draws: _Draws[Any] = _Draws(plan)
        self.traces = StageTraces(actors)

    def submit(self, a_pass: Pass) -> Pending:
        payload = encode(a_pass)
        # Names show in ps and on the dashboard. Ray keeps statistics by name, so there are few.
        refs = [
            actor.run.options(name=f"stage {i}", concurrency_group=PASSES).remote(
                payload, self._draws.needed(a_pass, i)
            )
            for i, actor in enumerate(self._actors)
        ]
        self._draws.note(a_pass, refs)
        return _RayPending(refs, a_pass, self._deadline, self._check)

    def wait_host_tier(self) -> None:
        refs = [actor.wait_host_tier.remote() for actor in self._actors]
        gather(refs, self._most, doing="filling host memory")

    def check_adapter(self, adapter: Adapter) -> None:
        refs = [actor.check_adapter.remote(encode(adapter)) for actor in self._actors]
        gather(refs, self._most, doing="looking at an adapter")

    def replace(self, stage: int, actor: Any) -> None:
        """Another actor runs the stage's part of passes to come; none is under way."""
        self._actors[stage] = actor
        self.traces.replace(stage, actor)

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()


class _LocalPending:
    def __init__(self, futures: list[Future[PassResult]]) -> None:
        self._futures = futures

    def result(self) -> list[PassResult]:
        return [future.result() for future in self._futures]


def _run(stage: "Stage", ready: "Ready", before: Future[PassResult] | None) -> PassResult:
    return stage.run(ready, None if before is None else before.result())


class LocalPipeline:
    """The same stages as threads of this process: one device, tests, and no start-up time."""

    def __init__(self, stages: "Sequence[Stage]") -> None:
        self._stages = list(stages)
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"stage-{i}") for i in range(len(stages))
        ]
        self._lock = threading.Lock()
        self._draws: _Draws[Future[PassResult]] = _Draws(stages[0].config.plan)

    def submit(self, a_pass: Pass) -> Pending:
        with self._lock:  # all stages see passes in one order
            futures = [
                thread.submit(_run, stage, stage.prepare(a_pass), self._draws.needed(a_pass, i))
                for i, (thread, stage) in enumerate(zip(self._threads, self._stages, strict=True))
            ]
            self._draws.note(a_pass, futures)
            return _LocalPending(futures)

    def wait_host_tier(self) -> None:
        for stage in self._stages:
            stage.wait_host_tier()

    def check_adapter(self, adapter: Adapter) -> None:
        for stage in self._stages:
            stage.check_adapter(adapter)

    def begin_trace(self, passes: int) -> None:
        for thread, stage in zip(self._threads, self._stages, strict=True):
            thread.submit(stage.begin_trace, passes)

    def end_trace(self) -> Callable[[], list[StageTrace]]:
        ending = [
            thread.submit(stage.end_trace)
            for thread, stage in zip(self._threads, self._stages, strict=True)
        ]
        return lambda: [StageTrace(i, each.result()) for i, each in enumerate(ending)]

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for stage in self._stages:
            stage.close()
        for thread in self._threads:
            thread.shutdown()
