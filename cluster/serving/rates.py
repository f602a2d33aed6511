"""How many requests and tokens a minute keys may have."""

import math
from collections.abc import Callable, Iterable
from time import monotonic

from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.keys import ApiKey

MINUTE = 60.0

_SLACK = 1e-6
"""Seconds that sums of floating-point times may be off by."""


class Bucket:
    """Holds a minute's worth, at first too, and fills evenly. What is taken may leave it below zero.

    Times are in seconds, on any one clock.
    """

    def __init__(self, per_minute: int) -> None:
        self.limit = per_minute
        self._full_at = -math.inf

    def left(self, now: float) -> float:
        return self.limit * (1 - self.full_in(now) / MINUTE)

    def full_in(self, now: float) -> float:
        return max(0.0, self._full_at - now)

    def wait(self, amount: int, now: float) -> float:
        """Until it holds so much, or is full."""
        seconds = self.full_in(now) - self._seconds(self.limit - min(amount, self.limit))
        return seconds if seconds > _SLACK else 0.0

    def take(self, amount: int, now: float) -> None:
        self._full_at = max(self._full_at, now) + self._seconds(amount)

    def _seconds(self, amount: int) -> float:
        return MINUTE * amount / self.limit


class Rates:
    """What keys with such limits have left. A prompt's tokens are taken when it is let in, those of an
    answer as they come. Keys go by their names; one without a limit has all that it wants."""

    def __init__(self, keys: Iterable[ApiKey] = (), clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}
        for key in keys:
            if key.requests_per_minute is not None:
                self._requests[key.name] = Bucket(key.requests_per_minute)
            if key.tokens_per_minute is not None:
                self._tokens[key.name] = Bucket(key.tokens_per_minute)

    def take_request(self, name: str) -> None:
        """ApiError 429 when the key has none left."""
        self._take(self._requests.get(name), 1, "requests")

    def take_prompt(self, name: str, tokens: int) -> None:
        """ApiError 429 when the key has less left, and less than a whole minute's."""
        self._take(self._tokens.get(name), tokens, "tokens")

    def take_output(self, name: str, tokens: int) -> None:
        """An answer that has begun is not ended for this; the next prompt waits."""
        if (bucket := self._tokens.get(name)) is not None:
            bucket.take(tokens, self._clock())

    def headers(self, name: str) -> dict[str, str]:
        """OpenAI's, of the limits that the key has."""
        now, found = self._clock(), {}
        for what, buckets in (("requests", self._requests), ("tokens", self._tokens)):
            if (bucket := buckets.get(name)) is not None:
                found[f"x-ratelimit-limit-{what}"] = str(bucket.limit)
                found[f"x-ratelimit-remaining-{what}"] = str(max(0, int(bucket.left(now))))
                found[f"x-ratelimit-reset-{what}"] = _duration(bucket.full_in(now))
        return found

    def _take(self, bucket: Bucket | None, amount: int, what: str) -> None:
        if bucket is None:
            return
        now = self._clock()
        seconds = bucket.wait(amount, now)
        if seconds:
            raise ApiError(
                429,
                f"this API key may have {bucket.limit} {what} a minute: {max(0, int(bucket.left(now)))} are"
                f" left, and this takes {amount}; try again in {_duration(seconds)}",
                code="rate_limit_exceeded",
                retry_after=math.ceil(seconds),
            )
        bucket.take(amount, now)


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 17ms, 1.5s, 6m0s."""
    milliseconds = math.ceil(1000 * seconds - 1000 * _SLACK)
    if milliseconds < 1000:
        return f"{max(0, milliseconds)}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
