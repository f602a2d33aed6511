"""When samples of what was answered are compared with the reference, and what came of it."""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic

from headrace.cluster.completion import Completion
from headrace.cluster.serving.generation import Order as Request
from headrace.cluster.serving.shadow.child import Child, ChildDiedError
from headrace.cluster.serving.shadow.messages import Order, Report, Setup
from headrace.cluster.serving.shadow.options import ShadowOptions
from headrace.cluster.serving.shadow.samples import Lottery, Sample, SampleQueue
from headrace.runtime.evaluation.answers import Answer, AnswerFigures
from headrace.scheduler.request import SamplingParams

log = logging.getLogger(__name__)

IDLE_SECONDS = 3.0
"""Without an open request, until the server counts as idle."""

POLL_SECONDS = 0.1
"""How soon a comparison is told to hold when a request comes: it does so after the layer that it is in."""

ATTEMPTS = 2
"""For a batch: what ends the process twice may be of the batch's own making."""

FIRST_BACKOFF, LAST_BACKOFF = 1.0, 300.0
"""Seconds until the process is started again; doubled each time until a batch has been compared."""


@dataclass(slots=True)
class Totals:
    """Since the server started. `kld` in nats, summed over tokens; `last` are the newest batch's figures, which came at
    `ended` on time.monotonic."""

    sequences: int = 0
    tokens: int = 0
    kld: float = 0.0
    greedy_tokens: int = 0
    strayed: int = 0
    strayed_from_reference: int = 0
    restarts: int = 0
    last: AnswerFigures | None = None
    ended: float = 0.0

    def add(self, figures: AnswerFigures) -> None:
        self.sequences += figures.sequences
        self.tokens += figures.tokens
        self.kld += figures.kld_mean * figures.tokens
        self.greedy_tokens += figures.greedy_tokens
        self.strayed += figures.strayed
        self.strayed_from_reference += figures.strayed_from_reference
        self.last, self.ended = figures, monotonic()


class Shadow:
    """Runs on the server's event loop, and a process of its own computes. Nothing of it waits for, or fails, a request."""

    def __init__(
        self,
        options: ShadowOptions,
        setup: Setup,
        is_busy: Callable[[], bool],
        secret: bytes | None = None,
    ) -> None:
        self.options, self._setup, self._is_busy = options, setup, is_busy
        self._lottery = Lottery(options.sample, os.urandom(16) if secret is None else secret)
        self.queue = SampleQueue(options.tokens, setup.longest)
        self.totals = Totals()
        self._child: Child | None = None
        self._task: asyncio.Task[None] | None = None
        self._fresh = asyncio.Event()
        self._busy_at = monotonic()
        self._backoff = FIRST_BACKOFF

    @property
    def pid(self) -> int | None:
        """The process's, between its start and its end."""
        return None if self._child is None else self._child.pid

    def offer(self, request: Request, completion: Completion) -> None:
        """A sequence has ended by itself. One with an adapter is another model's."""
        self._busy_at = monotonic()
        if request.adapter is None and self._lottery.draws(completion.request_id):
            greedy = is_plainly_greedy(request.params)
            self.queue.offer(request.token_ids, completion.token_ids, greedy=greedy)
            self._fresh.set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._part()

    async def _run(self) -> None:
        try:
            while True:
                batch = await self._next_batch()
                figures = await self._compare(batch)
                self.queue.release(batch, None if figures is not None else "failed")
                if figures is not None:
                    self.totals.add(figures)
        except Exception:
            log.exception("the shadow failed: nothing is compared from here on")

    async def _next_batch(self) -> list[Sample]:
        """Waits until there are samples, and nobody else is there or the oldest has waited too long."""
        while True:
            if self.queue.oldest is None:
                self._fresh.clear()
                await self._fresh.wait()
            if self._may_compare(self.queue.oldest):
                return self.queue.take(self._setup.padded)
            await asyncio.sleep(POLL_SECONDS)

    def _may_compare(self, oldest: float | None) -> bool:
        now = monotonic()
        if self._is_busy():
            self._busy_at = now
        is_overdue = oldest is not None and now - oldest >= self.options.patience
        return is_overdue or now - self._busy_at >= IDLE_SECONDS

    async def _compare(self, batch: Sequence[Sample]) -> AnswerFigures | None:
        """None when it cannot be had: the log says why."""
        answers = tuple(
            Answer(tuple(sample.tokens), sample.prompt, sample.greedy) for sample in batch
        )
        for _ in range(ATTEMPTS):
            try:
                report = await self._asked(answers, batch[0].taken)
            except ChildDiedError as error:
                await self._part()
                self.totals.restarts += 1
                log.warning("the shadow's %s; again in %g s", error, self._backoff)
                await self._back_off()
                continue
            if report.figures is not None:
                self._backoff = FIRST_BACKOFF
                return report.figures
            log.warning("the shadow could not compare answers: %s", report.error)
            await self._back_off()
            break
        return None

    async def _asked(self, answers: tuple[Answer, ...], oldest: float) -> Report:
        """Has the process compare, and hold while somebody waits for the ring. ChildDiedError."""
        if self._child is None:
            self._child = await Child.start(self._setup)
        child = self._child
        is_held = not self._may_compare(oldest)
        child.tell(Order(answers, is_held))
        report = asyncio.create_task(child.report())
        try:
            while not (await asyncio.wait([report], timeout=POLL_SECONDS))[0]:
                if (hold := not self._may_compare(oldest)) != is_held:
                    child.tell(Order(None, hold))
                    is_held = hold
            return report.result()
        finally:
            report.cancel()

    async def _back_off(self) -> None:
        wait, self._backoff = self._backoff, min(2 * self._backoff, LAST_BACKOFF)
        await asyncio.sleep(wait)

    async def _part(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.close()


def is_plainly_greedy(params: SamplingParams) -> bool:
    """Whether every token was to be the likeliest by the model's own logits."""
    is_changed = params.needs_history or params.biases or params.structured_outputs is not None
    return params.temperature == 0 and not is_changed
