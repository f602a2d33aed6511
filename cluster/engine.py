"""The engine: keeps the ring full, commits what comes back, and turns tokens into text."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

from headrace.cluster.completion import Completion
from headrace.cluster.engine_stats import EngineStats
from headrace.cluster.outputs import Outputs
from headrace.cluster.pass_bound import least_seconds
from headrace.cluster.pipeline import Pending, Pipeline
from headrace.cluster.replacement import Replacement, StageReplacer
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer
from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.contexts import ContextIds
from headrace.scheduler.drafter import Guesses
from headrace.scheduler.errors import StageError
from headrace.scheduler.limits import check_request
from headrace.scheduler.moves import MoveReports
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan import Pass, PassResult, Sample
from headrace.scheduler.plan_inputs import PlanInputs
from headrace.scheduler.request import FinishReason, Priority, Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from headrace.cluster.stage_logs import StageLogs
    from headrace.cluster.trace_file import RunTrace  # imports torch: a driver has no time yet
    from headrace.runtime.kv_log.stats import LogReport

log = logging.getLogger(__name__)


class Engine:
    """Requests in, completions out. One thread calls it; stages work elsewhere."""

    def __init__(
        self,
        plan: Plan,
        pipeline: Pipeline,
        tokenizer: Any,
        *,
        stop_ids: frozenset[int],
        digest: str,
        dtype: str,
        tenant: str = "",
        trace: "RunTrace | None" = None,
        logs: "StageLogs | None" = None,
        replacer: StageReplacer | None = None,
        vocabulary: int | None = None,
    ) -> None:
        """Takes over what the stages' `logs` hold of `tenant`, whose all requests are. The model has
        logits of `vocabulary` tokens: as many as the tokenizer, unless it is told."""
        self.plan = plan
        self.inputs: PlanInputs | None = None  # what the plan was made from, if that is known
        self.model_digest = digest
        self.max_context = plan.max_context
        self.stats = EngineStats(plan.placement.num_stages)
        identity = f"{digest} {plan.kv_format} {dtype} {tenant}"
        self._scheduler = Scheduler(scheduler_config(plan, identity))
        self._logs, self._warned_of_keep = logs, False
        if logs is not None:
            self._scheduler.adopt(logs.keys())
            self.stats.kv = self._scheduler.kv_stats()
        self._reports = MoveReports(plan.placement.num_stages)
        self.tokenizer, self.trace = tokenizer, trace
        self._tracer: Tracer = trace.driver if trace else NULL_TRACER
        self._pipeline, self._stop_ids = pipeline, stop_ids
        self._outputs = Outputs(tokenizer, stop_ids, vocabulary)
        self._replacer = replacer
        self._completed: list[Completion] = []  # by passes that `step` did not wait for
        self._in_flight: deque[tuple[Pass, Pending]] = deque()
        self._next_id = 0
        self._newest_started = -1
        self._busy_since: float | None = None

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
        on_token: Callable[[Sample], None] | None = None,
    ) -> int:
        """Queue a prompt; returns the request's id. RequestError when it cannot be served.

        Nothing that a tenant has had computed is found by another one, and of one priority tenants have
        shares by `weight` (at least 1). `keep` saves the keys and
        values below the device for a prompt that goes on from where this one ends. `on_token` is called
        by `step` with each of its tokens, once that is committed.
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
        )  # fmt: skip
        self._scheduler.add(request)
        self._outputs.start(request, on_token)
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
        self.stats.kv = self._scheduler.kv_stats()

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

        With a pass ahead, the next one runs while this one's tokens are committed.
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
        a_pass, pending = self._in_flight.popleft()
        results = pending.result()
        with self._tracer.span(Kind.COMMIT, number=a_pass.step):
            completions = self._apply(a_pass, results)
        self.stats.busy_seconds += time.monotonic() - started
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
        the new process, StageError when a stage dies.
        """
        assert self._replacer is not None, "these stages are no processes"
        started, found = time.monotonic(), self._replacer.find(stage, node)
        self._come_to_rest()
        ids, step = self._scheduler.contexts(), self._scheduler.next_step
        taken = self._replacer.replace(stage, ids, step, found)
        gone = taken.lost.plus(ContextIds(window=ids.window))
        lost, requests = len(gone), self._scheduler.lose(gone)
        if self._logs is not None:
            self._scheduler.retain({*self._logs.keys()})
        self.stats.kv = self._scheduler.kv_stats()
        seconds = time.monotonic() - started
        done = Replacement(stage, len(ids) - lost, taken.nbytes, lost, requests, seconds)
        log.info("%s", done)
        return done

    def _come_to_rest(self) -> None:
        """Return when no pass and no move of pages is under way."""
        while True:
            while self._in_flight:
                a_pass, pending = self._in_flight.popleft()
                self._completed += self._apply(a_pass, pending.result())
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
                self._apply(a_pass, pending.result())
            while (last := self._scheduler.save()) is not None:
                self._apply(last, self._pipeline.submit(last).result())
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

    def _apply(self, a_pass: Pass, results: Sequence[PassResult]) -> list[Completion]:
        if any(result.step != a_pass.step for result in results):
            raise StageError(f"a stage answered another pass than {a_pass.step}")
        samples = [sample for result in results for sample in result.samples]
        spoiled = {request for result in results for request in result.spoiled}
        moved, lost = self._reports.merge(results)
        update = self._scheduler.update(a_pass, samples, moved, lost, spoiled)
        self.stats.add(a_pass, results)
        self.stats.kv, self.stats.drafts = (
            self._scheduler.kv_stats(),
            self._scheduler.speculation.counts,
        )
        ended = {request.request_id: request for request in update.finished}
        texts: dict[int, str] = {}
        left = Counter(request.request_id for request, _ in update.committed)
        for request, sample in update.committed:
            number = request.request_id
            left[number] -= 1
            if number in texts:
                continue  # behind the stop string, in the same pass
            self.stats.output_tokens += 1
            if (text := self._outputs.push(number, sample)) is None:
                continue
            texts[number], kept = text, request.num_output - left[number]
            if self._scheduler.finish(number, FinishReason.STOP, kept) is None:
                request.truncate(kept)
            request.finish_reason, ended[number] = FinishReason.STOP, request
        errors = self._follow([r for r, _ in update.committed if r.request_id not in ended])
        ended |= {request.request_id: request for request in errors}
        reasons = {request.request_id: error for request, error in errors.items()}
        self.stats.prompt_tokens += sum(request.num_prompt for request in ended.values())
        complete = self._outputs.complete
        return [complete(r, texts.get(i), reasons.get(i)) for i, r in ended.items()]

    def _follow(self, requests: Sequence[Request]) -> dict[Request, str | None]:
        """Find out what may come next of those that follow a grammar. The ones that end now: with an error,
        or because their answer is complete."""
        ended = self._outputs.follow([request for request in requests if request.mask])
        for request, error in ended.items():
            reason = FinishReason.STOP if error is None else FinishReason.ABORT
            self._scheduler.finish(request.request_id, reason, request.num_output)
        return ended


def scheduler_config(plan: Plan, identity: str = "") -> SchedulerConfig:
    """What the scheduler is told of a plan; `identity` of what its keys and values depend on."""
    return SchedulerConfig(
        num_pages=plan.num_pages,
        num_tails=plan.num_tails,
        max_context=plan.max_context,
        token_budget=plan.token_budget,
        max_sequences=plan.max_sequences,
        micro_batches=plan.micro_batches,
        micro_batch_tokens=plan.micro_batch_tokens,
        passes_in_flight=plan.passes_in_flight,
        ahead=plan.ahead,
        host_pages=plan.host_pages,
        nvme_pages=plan.nvme_pages,
        costs=plan.kv_costs,
        drafts=plan.drafts,
        kv_ring_pages=plan.kv_ring_pages,
        cold_micro_batches=plan.cold_micro_batches,
        window_pages=plan.window_pages,
        hot_window=plan.hot_window,
        identity=identity,
    )
