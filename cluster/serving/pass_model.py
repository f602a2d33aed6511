"""How long a pass takes, by the tokens in it: learned from those that have been."""

from dataclasses import dataclass

_KEPT = 0.98
"""Of what is known, when another pass is added: the last fifty or so count."""

_STALLED = 5.0
"""Times what was expected: a pass that took longer counts as one that took this long. A stage that is
replaced once should not be expected in every pass."""

_ALIKE = 0.05
"""Spread of token counts, relative to their mean, below which they do not show what a token costs."""


@dataclass(frozen=True, slots=True)
class Pace:
    """A pass of n tokens takes `fixed` + n * `per_token` seconds; recent ones had `tokens`. The shortest that
    there was took `shortest`."""

    fixed: float = 0.0
    per_token: float = 0.0
    tokens: float = 0.0
    shortest: float = 0.0

    def seconds(self, tokens: float) -> float:
        return self.fixed + tokens * self.per_token

    @property
    def recent(self) -> float:
        """What recent passes took."""
        return self.seconds(self.tokens)


class PassModel:
    """A line through (tokens, seconds) of passes by least squares, in which old ones fade."""

    def __init__(self) -> None:
        self._n = self._t = self._nn = self._nt = self._weight = 0.0
        self._shortest = 0.0
        self.pace = Pace()

    def observe(self, tokens: int, seconds: float) -> None:
        """A pass of `tokens` returned `seconds` after the one before, or after it was begun."""
        self._shortest = min(seconds, self._shortest or seconds)
        if self._weight > 1.0:
            seconds = min(seconds, _STALLED * self.pace.seconds(tokens))
        self._weight = _KEPT * self._weight + 1.0
        self._n = _KEPT * self._n + tokens
        self._t = _KEPT * self._t + seconds
        self._nn = _KEPT * self._nn + tokens * tokens
        self._nt = _KEPT * self._nt + tokens * seconds
        self.pace = self._fit()

    def _fit(self) -> Pace:
        n, t = self._n / self._weight, self._t / self._weight
        spread = self._nn / self._weight - n * n
        slope = self.pace.per_token
        if spread > (_ALIKE * n) ** 2:
            slope = (self._nt / self._weight - n * t) / spread
        slope = min(max(slope, 0.0), t / n)  # neither a pass nor a token takes less than nothing
        return Pace(t - slope * n, slope, n, self._shortest)
