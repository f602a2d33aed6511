"""A ring of stages seen from the engine: passes go in, results come out, in order.

Every Ray call of a running ring is made here; the engine and the scheduler know only `Pipeline`.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import ray

from headrace.cluster.wire import decode, encode
from headrace.runtime.stage import Stage
from headrace.scheduler.errors import HeadraceError, StageError
from headrace.scheduler.plan import Pass, PassResult


class Pending(Protocol):
    def result(self) -> list[PassResult]:
        """One result a stage, when all have finished. StageError when any failed."""


class Pipeline(Protocol):
    def submit(self, a_pass: Pass) -> Pending:
        """Start a pass on every stage; returns at once. Stages run passes in submission order."""

    def close(self) -> None: ...


class _RayPending:
    def __init__(self, refs: list[Any], deadline: float) -> None:
        self._refs, self._deadline = refs, deadline

    def result(self) -> list[PassResult]:
        waiting = list(self._refs)
        while waiting:
            # One at a time, so that the first stage to fail is the one that is reported.
            done, waiting = ray.wait(waiting, num_returns=1, timeout=self._deadline)
            if not done:
                late = [self._refs.index(ref) for ref in waiting]
                raise StageError(f"stages {late} did not answer within {self._deadline:.0f} s")
            self._raise_failure(done[0])
        return [decode(payload, PassResult) for payload in ray.get(self._refs)]

    def _raise_failure(self, ref: Any) -> None:
        try:
            ray.get(ref)
        except ray.exceptions.RayActorError as error:
            stage = self._refs.index(ref)
            raise StageError(f"stage {stage} died: {str(error).splitlines()[0]}") from error
        except ray.exceptions.RayTaskError as error:
            stage = self._refs.index(ref)
            if isinstance(error.cause, StageError):
                self._raise_death(error.cause)
            if isinstance(error.cause, HeadraceError):
                raise error.cause from None
            raise StageError(f"stage {stage} failed: {error}") from error

    def _raise_death(self, error: StageError) -> None:
        """A broken edge is the echo of a peer's death: report the death when there is one."""
        done, _ = ray.wait(self._refs, num_returns=len(self._refs), timeout=2.0)
        for ref in done:
            try:
                ray.get(ref)
            except ray.exceptions.RayActorError as death:
                stage = self._refs.index(ref)
                raise StageError(f"stage {stage} died: {str(death).splitlines()[0]}") from death
            except ray.exceptions.RayTaskError:
                continue
        raise error from None


class RayPipeline:
    """Stages that are Ray actors. One call per stage and pass; all stages get the same bytes."""

    def __init__(self, actors: Sequence[Any], deadline: float) -> None:
        self._actors, self._deadline = list(actors), deadline

    def submit(self, a_pass: Pass) -> Pending:
        payload = encode(a_pass)
        name = f"pass {a_pass.step}"
        refs = [actor.run.options(name=name).remote(payload) for actor in self._actors]
        return _RayPending(refs, self._deadline)

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()


class _LocalPending:
    def __init__(self, futures: list[Future[PassResult]]) -> None:
        self._futures = futures

    def result(self) -> list[PassResult]:
        return [future.result() for future in self._futures]


class LocalPipeline:
    """The same stages as threads of this process: one device, tests, and no start-up time."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = list(stages)
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"stage-{i}") for i in range(len(stages))
        ]
        self._lock = threading.Lock()

    def submit(self, a_pass: Pass) -> Pending:
        with self._lock:  # all stages see passes in one order
            pairs = zip(self._threads, self._stages, strict=True)
            return _LocalPending([thread.submit(stage.run, a_pass) for thread, stage in pairs])

    def close(self) -> None:
        for stage in self._stages:
            stage.close()
        for thread in self._threads:
            thread.shutdown()
