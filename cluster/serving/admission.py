"""Whether a request can have what it asks for in time, by a forecast whose errors are watched."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.forecast import Ahead, Forecast, Line
from headrace.cluster.serving.generation import Generation, Order
from headrace.cluster.serving.pass_model import Pace
from headrace.cluster.serving.terms import Terms
from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.request import SamplingParams

MISSED = 0.005
"""Share of the requests let in that may come later than they were promised."""

_WINDOW = 400
_OLD = 60.0
"""So many forecasts, and of so many seconds, are remembered with how they turned out."""

_LEAST = 0.5
_MORE = 1.25
"""At least so much is added, and so many times what was needed: it makes the line shorter and no pass, and a
machine with other work has bad moments that have not been seen yet."""

_MOST = 1.0
_MOST_RETRY = 3600

_HELD = 0.5
"""Of the time that is to spare, what a pass may be held for. The rest is for what no forecast knows."""


class Margin:
    """What is added to a forecast so that all but MISSED come in time.

    In parts of the forecast and two passes: more than was needed lately by all but MISSED. What went wrong
    once is forgotten after a while, or nobody would be let in any more who could show that it has passed.
    """

    def __init__(self) -> None:
        self._errors: deque[tuple[float, float]] = deque(maxlen=_WINDOW)  # when, and by how much

    def promise(self, seconds: float, pace: Pace, now: float) -> float:
        return seconds + self.level(now) * _scale(seconds, pace)

    def level(self, now: float) -> float:
        while self._errors and now - self._errors[0][0] > _OLD:
            self._errors.popleft()
        if not self._errors:
            return _LEAST
        errors = sorted(error for _, error in self._errors)
        return min(max(_MORE * errors[int((1 - MISSED) * (len(errors) - 1))], _LEAST), _MOST)

    def note(self, forecast: float, seconds: float, pace: Pace, now: float) -> None:
        """What was forecast to come took `seconds`."""
        self._errors.append((now, (seconds - forecast) / _scale(forecast, pace)))


def _scale(seconds: float, pace: Pace) -> float:
    return max(seconds + 2 * pace.recent, 1e-3)


@dataclass(slots=True)
class Promise:
    """What was forecast of a request when it was let in, `at` the clock's time. It is kept if a pass that could take it in
    begins by `begin_by`."""

    at: float = 0.0
    pace: Pace = field(default_factory=Pace)
    forecast: Forecast | None = None
    begin_by: float = math.inf


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
        self._shares: deque[tuple[float, float]] = deque(maxlen=_WINDOW)  # when, and such a part

    def promise(
        self,
        orders: Sequence[Order],
        terms: Terms,
        pace: Pace,
        now: float,
        held: float | None = None,
    ) -> Promise:
        """What can be promised. ApiError 429 when that is later than the terms allow.

        While nothing runs, the first pass is `held` for so many seconds at most, and for no more than a part of those that
        the terms leave to spare."""
        if not terms.has_deadline:
            return Promise(now)
        if not self._open:
            # Nothing is known of now, and nothing would be if nobody were let in.
            _check("first token", pace.shortest, terms.first_within)
            least = pace.shortest * self._least_passes(orders, now)
            _check("last token", least, terms.done_within)
        *before, asked = [self._ahead(order, terms) for order in orders]
        there = [each for one in self._open.values() for each in one.sequences if each.output > 0]
        is_idle = held is not None or not there
        forecast = Line(self._limits, pace).forecast([*there, *before], asked, is_idle=is_idle)
        first = self._first.promise(forecast.first, pace, now)
        done = self._done.promise(forecast.done, pace, now)
        if self._open:
            _check("first token", first, terms.first_within)
            _check("last token", done, terms.done_within)
        spare = _HELD * terms.spare(first, done) if pace.recent else 0.0
        return Promise(now, pace, forecast.after(min(held or 0.0, spare)), now + spare)

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
        made = self._open[generation].promise
        if made.forecast is None:
            return None
        self._first.note(made.forecast.first, now - made.at, made.pace, now)
        return (now - made.at) / max(made.forecast.first, 1e-3)

    def came_last(self, generation: Generation, now: float) -> None:
        """It has ended, or the time for that is over."""
        one = self._open[generation]
        for ahead, drawn, limit in zip(one.sequences, one.drawn, one.limits, strict=True):
            if not ahead.output:
                self._shares.append((now, drawn / limit))
        made = one.promise
        if made.forecast is not None:
            self._done.note(made.forecast.done, now - made.at, made.pace, now)

    def leave(self, generation: Generation) -> None:
        del self._open[generation]

    def _least_passes(self, orders: Sequence[Order], now: float) -> int:
        """In which the longest can end. What may end by itself is taken to be as long, of what it may have, as
        the shortest answer of late; when there was none, it is let in to show it."""
        while self._shares and now - self._shares[0][0] > _OLD:
            self._shares.popleft()
        share = min((share for _, share in self._shares), default=0.0)
        tokens = max(
            self._limit(order) * (1.0 if _runs_to_limit(order.params) else share)
            for order in orders
        )
        return max(1, math.ceil(tokens / (1 + self._limits.drafts.most)))

    def _limit(self, order: Order) -> int:
        return min(order.params.max_tokens, self._limits.max_context - len(order.token_ids))

    def _ahead(self, order: Order, terms: Terms) -> Ahead:
        output = self._limit(order) * (1.0 if order.params.ignore_eos else self._used)
        prompt = len(order.token_ids)
        return Ahead(terms.priority, order.tenant, terms.weight, prompt, max(1.0, output))


def _runs_to_limit(params: SamplingParams) -> bool:
    stops = params.stop or params.stop_token_ids or params.structured_outputs
    return params.ignore_eos and not stops


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
