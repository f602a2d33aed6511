"""Whether a request can have what it asks for in time, by a forecast whose errors are watched."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.forecast import Ahead, Forecast, Line
from headrace.cluster.serving.generation import Generation, Order
from headrace.cluster.serving.pass_model import Pace
from headrace.cluster.serving.terms import Terms
from headrace.scheduler.config import SchedulerConfig

MISSED = 0.005
"""Share of admitted requests that may come later than they were promised."""

_STEP = 0.05
_MOST_RETRY = 3600


class Margin:
    """What is added to a forecast so that all but MISSED come in time.

    In parts of the forecast and two passes: it goes up by much with each that came later, and down by
    little with each that did not, until as many do as may (Gibbs and Candes, Adaptive Conformal Inference
    Under Distribution Shift, 2021).
    """

    def __init__(self) -> None:
        self.level = 0.25

    def promise(self, seconds: float, pace: Pace) -> float:
        return seconds + self.level * (seconds + 2 * pace.recent)

    def note(self, promised: float, seconds: float) -> None:
        """What was promised to come took `seconds`."""
        self.level += _STEP * ((1 - MISSED) if seconds > promised else -MISSED)
        self.level = min(max(self.level, 0.0), 10.0)


@dataclass(slots=True)
class Promise:
    """By when a request was let in to be served: seconds after that, with their margins."""

    at: float = 0.0
    forecast: Forecast | None = None
    first: float = math.inf
    done: float = math.inf


@dataclass(slots=True)
class _Open:
    promise: Promise
    sequences: list[Ahead]
    limits: list[int]
    ends_early: list[bool]
    drawn: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.drawn = [0] * len(self.sequences)


class Admission:
    """Follows all open requests, and turns away those that would come too late. Times are the clock's."""

    def __init__(self, limits: SchedulerConfig) -> None:
        self._limits = limits
        self._open: dict[Generation, _Open] = {}
        self._first, self._done = Margin(), Margin()
        self._used = 1.0  # of what answers may have, the part that they take

    def promise(self, orders: Sequence[Order], terms: Terms, pace: Pace, now: float) -> Promise:
        """What can be promised. ApiError 429 when that is later than the terms allow."""
        if not terms.has_deadline:
            return Promise(now)
        *before, asked = [self._ahead(order, terms) for order in orders]
        there = [each for one in self._open.values() for each in one.sequences if each.output > 0]
        forecast = Line(self._limits, pace).forecast([*there, *before], asked)
        made = Promise(
            now,
            forecast,
            self._first.promise(forecast.first, pace),
            self._done.promise(forecast.done, pace),
        )
        _check("first token", made.first, terms.first_within)
        _check("last token", made.done, terms.done_within)
        return made

    def enter(self, generation: Generation, promise: Promise) -> None:
        orders = generation.orders
        self._open[generation] = _Open(
            promise,
            [self._ahead(order, generation.terms) for order in orders],
            [self._limit(order) for order in orders],
            [not order.params.ignore_eos for order in orders],
        )

    def advance(self, generation: Generation, index: int, count: int, *, has_ended: bool) -> None:
        """A sequence has drawn `count` more tokens."""
        one = self._open[generation]
        ahead, limit = one.sequences[index], one.limits[index]
        one.drawn[index] += count
        ahead.has_begun = True
        ahead.prompt += count
        ahead.output = 0 if has_ended else max(1.0, ahead.output - count)
        if has_ended and one.ends_early[index]:
            self._used += 0.05 * (one.drawn[index] / limit - self._used)

    def came_first(self, generation: Generation, now: float) -> float | None:
        """All its sequences have a token, or the time for that is over. What it took, as a multiple of
        what was forecast."""
        promise = self._open[generation].promise
        return self._settle(self._first, promise, promise.first, now)

    def came_last(self, generation: Generation, now: float) -> None:
        """It has ended, or the time for that is over."""
        promise = self._open[generation].promise
        self._settle(self._done, promise, promise.done, now)

    def leave(self, generation: Generation) -> None:
        del self._open[generation]

    @staticmethod
    def _settle(margin: Margin, promise: Promise, promised: float, now: float) -> float | None:
        if promise.forecast is None:
            return None
        seconds = now - promise.at
        margin.note(promised, seconds)
        return seconds / max(promise.forecast.first, 1e-3)

    def _limit(self, order: Order) -> int:
        return min(order.params.max_tokens, self._limits.max_context - len(order.token_ids))

    def _ahead(self, order: Order, terms: Terms) -> Ahead:
        output = self._limit(order) * (1.0 if order.params.ignore_eos else self._used)
        prompt = len(order.token_ids)
        return Ahead(terms.priority, order.tenant, terms.weight, prompt, max(1.0, output))


def _check(what: str, promised: float, within: float | None) -> None:
    if within is None or promised <= within:
        return
    raise ApiError(
        429,
        f"the {what} would come after about {promised:.2g} s, and it is wanted within {within:.4g} s:"
        " try again later, or allow more",
        code="deadline_unreachable",
        retry_after=min(_MOST_RETRY, max(1, math.ceil(promised - within))),
    )
