"""The scheduler: requests in, passes out, samples in, tokens committed."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.draft import Draft
from headrace.scheduler.errors import RequestError
from headrace.scheduler.pages import PagePool, pages_for
from headrace.scheduler.plan import PAGE_TOKENS, Pass, Sample, Slice
from headrace.scheduler.policy import by_age, choose_victim, service_order, watermark
from headrace.scheduler.request import FinishReason, Request


@dataclass(frozen=True, slots=True)
class Update:
    """What a returned pass brought: the tokens it committed and the requests that these ended."""

    committed: list[tuple[Request, Sample]]
    finished: list[Request]


class Scheduler:
    """Continuous batching over one pool of KV pages.

    A live request waits (no pages) or runs (pages for what it has computed). Several passes may be
    in flight; a request is in at most one of them. Request ids are unique while a request lives or
    is in flight, and give precedence: lower ids are admitted first and preempted last.

    There is always a runnable request. `add` refuses what could not run alone, admission reserves
    the pages of all tokens that a request has, so that only decodes need more, and only younger
    requests give theirs up. With nothing in flight, the oldest running request can therefore
    always go on, and if none runs all pages are free for the oldest one that waits.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = PagePool(config.num_pages)
        self.num_preemptions = 0
        self._step = 0
        self._live: dict[int, Request] = {}
        self._running: dict[int, Request] = {}
        # Also requests that ended while in flight: stages may still write to their pages.
        self._in_flight: dict[int, Request] = {}
        # A heap of ids. One that ended or runs by now is skipped when it comes up.
        self._waiting: list[int] = []

    @property
    def has_work(self) -> bool:
        """Whether a request is live or a pass is still to be returned to `update`."""
        return bool(self._live or self._in_flight)

    @property
    def num_waiting(self) -> int:
        return len(self._live) - len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> None:
        """Queue a new request. Output is clipped to `max_context`, then ends with LENGTH.

        Raises RequestError when the prompt is empty, leaves no room for output, or when prompt and
        output together need more pages than there are.
        """
        assert request.request_id not in self._live, request.request_id
        assert request.request_id not in self._in_flight, request.request_id
        self._check(request)
        self._live[request.request_id] = request
        heappush(self._waiting, request.request_id)

    def abort(self, request_id: int) -> Request | None:
        """End a request and keep its output; None when it has already ended."""
        request = self._live.get(request_id)
        if request is None:
            return None
        return self.finish(request_id, FinishReason.ABORT, request.num_output)

    def finish(self, request_id: int, reason: FinishReason, num_output: int) -> Request | None:
        """End a request with its first `num_output` output tokens; None when it has already ended.

        If a pass in flight holds it, its result for the request is ignored, and the pages are freed
        when that pass is returned to `update`. The request is not in a later Update.
        """
        request = self._live.get(request_id)
        if request is None:
            return None
        assert 0 <= num_output <= request.num_output, (num_output, request.num_output)
        del request.tokens[request.num_prompt + num_output :]
        request.num_computed = min(request.num_computed, len(request.tokens))
        self._end(request, reason)
        return request

    def schedule(self) -> Pass | None:
        """The next pass, or None when nothing can run until a pass in flight returns."""
        # A pass that took every request would leave the others in flight without any.
        share = -(-len(self._live) // self.config.passes_in_flight)
        draft = Draft(self.config, min(self.config.max_sequences, share))
        self._continue_running(draft)
        self._admit_waiting(draft)
        if not draft.slices:
            assert self._in_flight or not self._live, "idle with work to do"
            return None
        self._step += 1
        return Pass(self._step, draft.pack())

    def update(self, a_pass: Pass, samples: Sequence[Sample]) -> Update:
        """Commit what a pass computed: one sample for each of its slices that asks for one."""
        drawn = {sample.request: sample for sample in samples}
        pieces = [piece for batch in a_pass.micro_batches for piece in batch.slices]
        asked = {piece.request for piece in pieces if piece.sampling is not None}
        assert drawn.keys() == asked, (a_pass.step, drawn.keys() ^ asked)
        update = Update([], [])
        for piece in pieces:
            request = self._in_flight.pop(piece.request)
            if request.finish_reason is not None:
                self._release(request)
                continue
            request.num_computed = piece.end
            if piece.sampling is not None:
                self._commit(request, drawn[piece.request], update)
        return update

    def _check(self, request: Request) -> None:
        if not request.tokens:
            raise RequestError("the prompt is empty; give it at least one token")
        if request.num_prompt + 1 > self.config.max_context:
            raise RequestError(
                f"the prompt has {request.num_prompt} tokens, but a context of "
                f"{self.config.max_context} tokens holds at most {self.config.max_context - 1} and "
                "one of output; shorten the prompt or raise --context"
            )
        need = pages_for(self._limit(request) - 1)
        if need > self.config.num_pages:
            raise RequestError(
                f"a prompt of {request.num_prompt} tokens and up to "
                f"{self._limit(request) - request.num_prompt} of output need {need} KV pages of "
                f"{PAGE_TOKENS} tokens, but there are {self.config.num_pages}; shorten the prompt, "
                "lower max_tokens or raise --context"
            )

    def _limit(self, request: Request) -> int:
        """Tokens at which the request ends. The last one is never computed and needs no page."""
        return min(request.num_prompt + request.params.max_tokens, self.config.max_context)

    def _continue_running(self, draft: Draft) -> None:
        ready = by_age(r for i, r in self._running.items() if i not in self._in_flight)
        for request in service_order(ready):
            if not draft.room:
                break
            if request.request_id not in self._running:
                continue  # preempted by an older one, just now
            if self._grow(request, min(request.num_pending, draft.room), ready):
                self._take(request, draft)

    def _admit_waiting(self, draft: Draft) -> None:
        """Admit in order of age, never past one that does not fit: it would wait for ever."""
        growth = sum(self._growth(request) for request in self._running.values())
        while draft.room and (request := self._oldest_waiting()) is not None:
            tokens = min(len(request.tokens) + 1, self._limit(request) - 1)
            need = pages_for(tokens)
            # No more is left free than the running ones can still come to need.
            spare = min(growth, watermark(self.config.num_pages, len(self._running)))
            if not self.pool.can_allocate(need + spare):
                return
            heappop(self._waiting)
            request.pages = self.pool.allocate(need)
            growth += self._growth(request)
            self._running[request.request_id] = request
            self._take(request, draft)

    def _growth(self, request: Request) -> int:
        """Pages that a running request still lacks if it goes on to its limit."""
        return pages_for(self._limit(request) - 1) - len(request.pages)

    def _oldest_waiting(self) -> Request | None:
        while self._waiting:
            request_id = self._waiting[0]
            if request_id in self._live and request_id not in self._running:
                return self._live[request_id]
            heappop(self._waiting)
        return None

    def _grow(self, request: Request, count: int, ready: list[Request]) -> bool:
        """Make the pages cover `count` more tokens; younger requests give way if need be."""
        missing = max(0, pages_for(request.num_computed + count) - len(request.pages))
        while not self.pool.can_allocate(missing):
            victim = choose_victim(ready, request)
            if victim is None:
                return False
            ready.remove(victim)
            self._preempt(victim)
        request.pages += self.pool.allocate(missing)
        return True

    def _preempt(self, request: Request) -> None:
        """Back to waiting; its keys and values are computed again, its tokens stay."""
        # Those served before the needy one are older: only decodes grow, and they go by age.
        assert request.request_id not in self._in_flight, request.request_id
        self._release(request)
        request.num_computed = 0
        del self._running[request.request_id]
        heappush(self._waiting, request.request_id)
        self.num_preemptions += 1

    def _take(self, request: Request, draft: Draft) -> None:
        start = request.num_computed
        end = start + min(request.num_pending, draft.room)
        draft.add(
            Slice(
                request=request.request_id,
                start=start,
                tokens=tuple(request.tokens[start:end]),
                pages=tuple(request.pages[: pages_for(end)]),
                sampling=request.sampling() if end == len(request.tokens) else None,
            )
        )
        self._in_flight[request.request_id] = request

    def _commit(self, request: Request, sample: Sample, update: Update) -> None:
        request.tokens.append(sample.token)
        update.committed.append((request, sample))
        if sample.token in request.stop_ids:
            self._end(request, FinishReason.STOP)
        elif len(request.tokens) >= self._limit(request):
            self._end(request, FinishReason.LENGTH)
        if request.finish_reason is not None:
            update.finished.append(request)

    def _end(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        del self._live[request.request_id]
        self._running.pop(request.request_id, None)
        if request.request_id not in self._in_flight:
            self._release(request)

    def _release(self, request: Request) -> None:
        self.pool.free(request.pages)
        request.pages = []
