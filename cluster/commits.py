"""What passes return, committed: tokens to their requests, which end by them or go on."""

from collections import Counter
from collections.abc import Collection, Sequence

from headrace.cluster.completion import Completion
from headrace.cluster.engine_stats import EngineStats
from headrace.cluster.outputs import Outputs
from headrace.cluster.telemetry.events import EngineEvents
from headrace.scheduler.errors import StageError
from headrace.scheduler.moves import MoveReports
from headrace.scheduler.plan import Pass, PassResult
from headrace.scheduler.request import FinishReason, Request
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.update import Update


class Commits:
    """Takes in the passes of `stages` stages that `scheduler` made, in their order."""

    def __init__(
        self,
        scheduler: Scheduler,
        outputs: Outputs,
        events: EngineEvents,
        stats: EngineStats,
        stages: int,
    ) -> None:
        self._scheduler, self._outputs = scheduler, outputs
        self._events, self._stats, self._stages = events, stats, stages
        self._reports = MoveReports(stages)
        self._failures: dict[int, str] = {}  # of loads of adapters, by their numbers

    def forget_moves(self) -> None:
        """What some stages have reported of moves, others never will."""
        self._reports = MoveReports(self._stages)

    def apply(self, a_pass: Pass, results: Sequence[PassResult]) -> list[Completion]:
        """Of the requests that end by it."""
        if any(result.step != a_pass.step for result in results):
            raise StageError(f"a stage answered another pass than {a_pass.step}")
        update, lost = self._take_in(a_pass, results)
        texts = self._push(update)
        ended = {request.request_id: request for request in update.finished}
        ended |= {r.request_id: r for r, _ in update.committed if r.request_id in texts}
        errors = self._follow([r for r, _ in update.committed if r.request_id not in ended])
        ended |= {request.request_id: request for request in errors}
        reasons = {request.request_id: error for request, error in errors.items()}
        for request, number in update.without_adapter:
            ended[request.request_id] = request
            reasons[request.request_id] = self._failures[number]
        for number in lost:
            self._failures.pop(number, None)
        self._stats.prompt_tokens += sum(request.num_prompt for request in ended.values())
        complete = self._outputs.complete
        done = [complete(r, texts.get(i), reasons.get(i)) for i, r in ended.items()]
        for completion in done:
            self._events.ended(completion.request_id, completion.finish_reason)
        return done

    def _take_in(
        self, a_pass: Pass, results: Sequence[PassResult]
    ) -> tuple[Update, Collection[int]]:
        """What the scheduler makes of it, and moves that were lost."""
        samples = [sample for result in results for sample in result.samples]
        spoiled = {request for result in results for request in result.spoiled}
        self._failures.update(failure for result in results for failure in result.failures)
        moved, lost = self._reports.merge(results)
        update = self._scheduler.update(a_pass, samples, moved, lost, spoiled)
        self._stats.add(a_pass, results)
        self._stats.look(self._scheduler)
        return update, lost

    def _push(self, update: Update) -> dict[int, str]:
        """Turn tokens into text; the whole text, by request, of those that end because it has a stop string."""
        texts: dict[int, str] = {}
        left = Counter(request.request_id for request, _ in update.committed)
        self._events.committed(left)
        for request, sample in update.committed:
            number = request.request_id
            left[number] -= 1
            if number in texts:
                continue  # behind the stop string, in the same pass
            self._stats.output_tokens += 1
            if (text := self._outputs.push(number, sample)) is None:
                continue
            texts[number], kept = text, request.num_output - left[number]
            if self._scheduler.finish(number, FinishReason.STOP, kept) is None:
                request.truncate(kept)
            request.finish_reason = FinishReason.STOP
        return texts

    def _follow(self, requests: Sequence[Request]) -> dict[Request, str | None]:
        """Find out what may come next of those that follow a grammar. The ones that end now: with an error,
        or because their answer is complete."""
        ended = self._outputs.follow([request for request in requests if request.mask])
        for request, error in ended.items():
            reason = FinishReason.STOP if error is None else FinishReason.ABORT
            self._scheduler.finish(request.request_id, reason, request.num_output)
        return ended
