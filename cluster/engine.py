"""The engine: keeps the ring full, commits what comes back, and turns tokens into text."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from headrace.cluster.adapters import Adapters
from headrace.cluster.commits import Commits
from headrace.cluster.completion import Completion
from headrace.cluster.engine_stats import EngineStats
from headrace.cluster.outputs import Outputs
from headrace.cluster.pass_bound import least_seconds
from headrace.cluster.pipeline import Pending
from headrace.cluster.recovered import Recovery
from headrace.cluster.recovery import StageStanding, StageState
from headrace.cluster.replacement import Replacement
from headrace.cluster.ring import Rebuild, Ring
from headrace.cluster.ring_trace import RingTrace, RingTracing, TracedPipeline
from headrace.cluster.telemetry.events import EngineEvents
from headrace.runtime.trace import Kind
from headrace.scheduler.batch_window import Gathered
from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.contexts import ContextIds, Taken
from headrace.scheduler.drafter import Guesses
from headrace.scheduler.errors import NoPlaceError, StageError, StageLostError
from headrace.scheduler.limits import check_request, limits_of
from headrace.scheduler.plan import Adapter, Pass, PassResult, Sample
from headrace.scheduler.request import FinishReason, Priority, Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from headrace.cluster.trace_file import RunTrace  # imports torch: a driver has no time yet
    from headrace.runtime.kv_log.stats import LogReport

log = logging.getLogger(__name__)

MOST_FRUITLESS = 5
"""Recoveries in a row after each of which stages were lost before any pass returned."""


class Engine:
    """Requests in, completions out. One thread calls it; stages work elsewhere."""

    def __init__(
        self,
        ring: Ring,
        tokenizer: Any,
        *,
        stop_ids: frozenset[int],
        digest: str,
        dtype: str,
        tenant: str = "",
        trace: "RunTrace | None" = None,
        rebuild: Rebuild | None = None,
        write_through: bool = False,
        vocabulary: int | None = None,
    ) -> None:
        """Takes over what the ring's logs hold of `tenant`, whose all requests are. The model has logits of
        `vocabulary` tokens: as many as the tokenizer, unless it is told. `rebuild` makes another ring where
        the cluster has no place for all stages of this one."""
        self.model_digest = digest
        self.stats = EngineStats(ring.plan.placement.num_stages)
        self.events = EngineEvents()
        self._identity = f"{digest} {ring.plan.kv_format} {dtype} {tenant}"
        self._write_through, self._rebuild, self._warned_of_keep = write_through, rebuild, False
        self.tokenizer, self.trace = tokenizer, trace
        self._tracing = RingTracing() if trace is None else trace.tracing
        self._tracer = self._tracing.tracer
        self._stop_ids = stop_ids
        self.adapters = Adapters()
        self._outputs = Outputs(tokenizer, stop_ids, vocabulary)
        self._enter(ring)
        self._fruitless = 0  # recoveries since a pass returned
        self._completed: list[Completion] = []  # by passes that `step` did not wait for
        self._in_flight: deque[tuple[Pass, Pending]] = deque()
        self._next_id = 0
        self._newest_started = -1
        self._busy_since: float | None = None

    def _enter(self, ring: Ring) -> None:
        """Begin with stages that hold nothing but what is in their logs."""
        self.plan, self.max_context = ring.plan, ring.plan.max_context
        self.inputs = ring.inputs
        self._pipeline, self._logs = TracedPipeline(ring.pipeline, self._tracer), ring.logs
        self._tracing.follow(ring.traces)
        self._replacer, self._recovery = ring.replacer, ring.recovery
        config = limits_of(ring.plan, self._identity, write_through=self._write_through)
        self._scheduler = Scheduler(config)
        stages = ring.plan.placement.num_stages
        self._commits = Commits(self._scheduler, self._outputs, self.events, self.stats, stages)
        if ring.logs is not None:
            self._scheduler.adopt(ring.logs.keys())
            self.stats.look(self._scheduler)

    def add(
        self,
        token_ids: list[int],
        params: SamplingParams,
        seed: int,
        *,
        tenant: str = "",
        keep: bool = False,
        priority: Priority = Priority.INTERACTIVE,
        weight: int = 1,
        adapter: str | None = None,
        said: Sequence[Sample] = (),
        on_token: Callable[[Sample], None] | None = None,
        arrived: float | None = None,
    ) -> int:
        """Queue a prompt; returns the request's id. RequestError when it cannot be served.

        Nothing that a tenant has had computed is found by another one, and of one priority tenants have
        shares by `weight` (at least 1). `keep` saves the keys and
        values below the device for a prompt that goes on from where this one ends. It runs with the `adapter` of
        that name. `said` are the first
        tokens of the answer, which an earlier run had committed. `on_token` is called by `step` with each
        of the others, once that is committed. Times are measured from when the request `arrived`, on
        time.monotonic, or else from now.
        """
        self._check_keep(keep)
        self._outputs.check(params)
        request_id, self._next_id = self._next_id, self._next_id + 1
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self._stop_ids
        request = Request(
            request_id, list(token_ids), params, seed, stop_ids, tenant, keep,
            priority=priority, weight=weight,
            adapter=None if adapter is None else self.adapters.find(adapter),
        )  # fmt: skip
        request.tokens += [sample.token for sample in said]
        self._scheduler.add(request)
        self._outputs.start(request, on_token, said)
        self.events.added(request_id, request.num_prompt, priority.value, arrived, adapter)
        return request_id

    def check(self, token_ids: list[int], params: SamplingParams) -> None:
        """RequestError when `add` would refuse this. Any thread may ask, at any time.

        It compiles the grammar that the answer is to follow, which may take a second.
        """
        self._outputs.check(params)
        check_request(Request(-1, token_ids, params, seed=0), self._scheduler.config)

    def abort(self, request_id: int) -> None:
        """Forget a request; it never completes. Unknown ids are ignored.

        Its pages are free at once, or when the passes that hold it have returned.
        """
        self._scheduler.abort(request_id)
        self._outputs.forget(request_id)
        self.events.ended(request_id, FinishReason.ABORT.value)
        self.stats.look(self._scheduler)

    def load_adapters(self, paths: Mapping[str, Path]) -> None:
        """Have requests name the adapters in these directories. HeadraceError when one cannot be applied to the
        model, has a larger rank than slots have room for, or a name that is taken."""
        from headrace.runtime.adapters.directory import open_adapter

        for name, path in paths.items():
            self.add_adapter(name, open_adapter(path).adapter)

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """`load_adapters` of one that was opened."""
        self.adapters.check_free(name)
        self._pipeline.check_adapter(adapter)
        self.adapters.add(name, adapter)

    def remove_adapter(self, name: str) -> None:
        """Nobody can name it any more; requests that do already go on. RequestError when there is none."""
        self.adapters.remove(name)

    def draft_with(self, make: Callable[[int], Guesses]) -> None:
        """Guess by others than drafters, each made for a request of how many tokens at most it may guess:
        to measure what that costs. For requests to come."""
        self._scheduler.speculation.make_drafter = make

    @property
    def max_sequences(self) -> int:
        """How many requests the passes under way can hold."""
        return self.plan.max_sequences * self.plan.passes_in_flight

    @property
    def limits(self) -> SchedulerConfig:
        """What bounds passes, and requests together."""
        return self._scheduler.config

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._completed)

    @property
    def gathered(self) -> Gathered | None:
        """What waits for its first pass while there is nothing else to do; None while there is."""
        return None if self._completed else self._scheduler.gathered

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def batch_counts(self) -> tuple[int, int]:
        """How many batch requests run, and how many wait."""
        return self._scheduler.batch_counts

    def has_started(self, request_id: int) -> bool:
        """Whether any token of the request was computed, or of a later one, for which it need not wait
        while its pages are loaded."""
        return request_id <= self._newest_started

    def step(self) -> list[Completion]:
        """Keep the ring full, then apply the oldest pass. Returns the requests that it finished.

        With a pass ahead, the next one runs while this one's tokens are committed. Where stages were lost,
        others take their place first, and the passes under way are made again.
        """
        started = time.monotonic()
        while len(self._in_flight) < self.plan.passes_in_flight + self.plan.ahead:
            with self._tracer.span(Kind.SCHEDULE):
                a_pass = self._scheduler.schedule()
            if a_pass is None:
                break
            self._in_flight.append((a_pass, self._pipeline.submit(a_pass)))
            pieces = (piece for batch in a_pass.micro_batches for piece in batch.slices)
            started_now = (piece.request for piece in pieces)
            self._newest_started = max(self._newest_started, *started_now, -1)
        earlier, self._completed = self._completed, []
        if not self._in_flight:
            return earlier
        returned = self._oldest()
        if returned is None:
            return earlier
        a_pass, results = returned
        with self._tracer.span(Kind.COMMIT, number=a_pass.step):
            completions = self._commits.apply(a_pass, results)
        seconds = time.monotonic() - started
        self.stats.busy_seconds += seconds
        self.stats.adapter_wait_seconds += seconds * self.stats.adapter_slots.waiting
        loaded = sum(result.times.experts_loaded for result in results)
        sunk = sum(result.times.kv_sunk_bytes for result in results)
        tokens, cold = a_pass.num_tokens, a_pass.num_cold
        self.stats.bound_seconds += least_seconds(self.plan, tokens, loaded, cold, sunk)
        return earlier + completions

    def replace_stage(self, stage: int, node: str | None = None) -> Replacement:
        """Have a new process take a stage's place, with the contexts of all requests: to take a GPU or a
        node out of service. Nothing is computed again but what sequences had in the window on NVMe; the
        others keep their weights and pages.

        Without a `node` it starts where the old one was, when that has gone; what is handed over is in
        the machine's memory meanwhile. On a `node` of the Ray cluster (its id, host name or address) it
        starts beside the old one, with a processor, and a GPU if stages have them, to spare there, and
        with the store under the same path. What the stage has on NVMe goes along on the same node only.
        Passes under way end first. HeadraceError when there is no such stage or node or no room for
        the new process. Where one dies meanwhile, stages are recovered as always.
        """
        assert self._replacer is not None, "these stages are no processes"
        started, found = time.monotonic(), self._replacer.find(stage, node)
        self._come_to_rest()
        ids, step = self._scheduler.contexts(), self._scheduler.next_step
        try:
            with self._tracer.span(Kind.REPLACE, number=stage):
                taken = self._replacer.replace(stage, ids, step, found)
        except StageLostError as error:
            self._recover(error)
            taken = Taken(lost=replace(ids, window=()))
        self._scheduler.lose_adapters()
        gone = taken.lost.plus(ContextIds(window=ids.window))
        lost, requests = len(gone), self._scheduler.lose(gone)
        if self._logs is not None:
            self._scheduler.retain({*self._logs.keys()})
        self.stats.look(self._scheduler)
        seconds = time.monotonic() - started
        done = Replacement(stage, len(ids) - lost, taken.nbytes, lost, requests, seconds)
        log.info("%s", done)
        return done

    def begin_trace(self, passes: int) -> None:
        """Record what the driver and the stages do, of each the newest `passes` passes, until `end_trace`; stages
        begin when the passes under way have ended. HeadraceError when that is done already."""
        self._tracing.begin(passes)

    def end_trace(self) -> Callable[[], RingTrace]:
        """Record no more. What is returned waits for the passes under way, in any thread."""
        return self._tracing.end()

    def stage_pids(self) -> list[int]:
        """Of the stages' processes, on the node where each is."""
        return [] if self._recovery is None else self._recovery.pids()

    @property
    def stage_states(self) -> list[StageState]:
        """Of the stages that are processes. Any thread may ask."""
        return [] if self._recovery is None else self._recovery.states

    def roster(self) -> list[StageStanding]:
        """Of each stage that is a process. Any thread may ask, at any time."""
        return [] if self._recovery is None else self._recovery.roster()

    def tend(self) -> None:
        """While there is nothing to do, look whether all stages are alive: others take the place of those
        that are not. Now and then, or the next request has to wait for that."""
        if self._recovery is not None and not self._in_flight:
            try:
                self._recovery.check()
            except StageLostError as error:
                self._recover(error)

    def _oldest(self) -> tuple[Pass, list[PassResult]] | None:
        """The oldest pass in flight and its results; None when stages were lost and others are there."""
        a_pass, pending = self._in_flight[0]
        try:
            results = pending.result()
        except StageLostError as error:
            self._recover(error)
            return None
        self._in_flight.popleft()
        self._fruitless = 0
        return a_pass, results

    def _recover(self, error: StageLostError) -> None:
        """Go on from what was committed, with other stages in place of those that were lost.

        StageError when that cannot be, or was of no use several times in a row.
        """
        if self._recovery is None:
            raise error
        log.warning("%s", error)
        self._fruitless += 1
        if self._fruitless > MOST_FRUITLESS:
            raise StageError(
                f"{error} No pass has returned since {MOST_FRUITLESS} recoveries: what runs now ends stages"
            )
        started = time.monotonic()
        try:
            with self._tracer.span(Kind.RECOVERY, "as a whole"):
                done = self._recovery.recover(error, self._scheduler.next_step, self._tracer)
        except NoPlaceError as no_place:
            self._move(no_place, waited=time.monotonic() - started)
            return
        self._abandon()
        self._commits.forget_moves()
        requests = self._scheduler.lose(self._scheduler.contexts()) if done.stages else 0
        if done.stages:
            self._scheduler.lose_adapters()
        self._recovered(replace(done, requests=requests))
        if self._logs is not None:
            try:
                self._scheduler.retain({*self._logs.keys()})
            except StageLostError as another:
                self._recover(another)
        self.stats.look(self._scheduler)

    def _recovered(self, done: Recovery) -> None:
        self.stats.recovered(done)
        self.events.recovered(done)
        log.warning("%s", done)

    def _abandon(self) -> None:
        self._scheduler.abandon(a_pass for a_pass, _ in self._in_flight)
        self._in_flight.clear()

    def _move(self, error: NoPlaceError, waited: float) -> None:
        """Go on with another ring, of fewer stages, after so many seconds in which there was no place for all.
        HeadraceError when there is none."""
        if self._rebuild is None:
            raise error
        log.warning("%s: the model is planned anew for what is left", error)
        started, before = time.monotonic(), self._scheduler
        self._abandon()
        requests = before.lose(before.contexts())
        self._enter(self._rebuild())
        self.stats.moved(self.plan.placement.num_stages)
        for request, why in self._scheduler.take_over(before.live):
            request.finish_reason = FinishReason.ABORT
            self.events.ended(request.request_id, FinishReason.ABORT.value)
            self._completed.append(self._outputs.complete(request, "", str(why)))
        phases = {"waiting for a place": waited, "planning anew": time.monotonic() - started}
        stages = self.plan.placement.num_stages
        self._recovered(Recovery(str(error), (), 1, phases, requests, replanned=stages))

    def _come_to_rest(self) -> None:
        """Return when no pass and no move of pages is under way."""
        while True:
            while self._in_flight:
                if (returned := self._oldest()) is not None:
                    self._completed += self._commits.apply(*returned)
            moving = self._scheduler.settle()
            if moving is None:
                return
            self._in_flight.append((moving, self._pipeline.submit(moving)))

    def wait_host_tier(self) -> None:
        """Return when every stage's host RAM is filled: before measuring, for passes go on meanwhile."""
        self._pipeline.wait_host_tier()

    def save(self) -> None:
        """Bring to NVMe what a later run may take over, before the end: no request is continued.

        A stage that fails now is logged: the run's results are there already, or its error is.
        """
        try:
            while self._in_flight:
                a_pass, pending = self._in_flight.popleft()
                self._commits.apply(a_pass, pending.result())
            while (last := self._scheduler.save()) is not None:
                self._commits.apply(last, self._pipeline.submit(last).result())
        except StageError as error:
            log.warning("not all KV pages were saved for the next run: %s", error)

    def log_reports(self) -> "list[LogReport | None]":
        """What the stages' KV logs have done until now; empty where there are none."""
        return [] if self._logs is None else self._logs.reports()

    def close(self) -> None:
        with ExitStack() as last_first:
            last_first.callback(self._pipeline.close)
            if self._logs is not None:
                last_first.callback(self._logs.close)  # while the stages are there
            if self.trace is not None:
                last_first.callback(self.trace.close)

    def _check_keep(self, keep: bool) -> None:
        if keep and not self.plan.host_pages and not self._warned_of_keep:
            self._warned_of_keep = True
            log.warning(
                "keep_context: pages stay on the device for as long as nobody needs their room; with"
                " --kv-host-memory (and --kv-directory) they are saved"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
