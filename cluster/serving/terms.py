"""What a request asks for beside tokens: its class, its share, and by when."""

import math
from dataclasses import dataclass, replace

from headrace.cluster.serving.errors import ApiError
from headrace.scheduler.request import Priority

TIMEOUT_HEADER = "x-request-timeout-ms"

MAX_MS = 7 * 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Terms:
    """The first token of each sequence is wanted `first_within` seconds after the request came, all of it
    `done_within`; None: whenever. Of one priority, shares are by `weight`."""

    priority: Priority = Priority.INTERACTIVE
    weight: int = 1
    first_within: float | None = None
    done_within: float | None = None

    @property
    def has_deadline(self) -> bool:
        return self.first_within is not None or self.done_within is not None

    def of_key(self, weight: int) -> "Terms":
        return replace(self, weight=weight)

    def with_timeout(self, header: str | None) -> "Terms":
        """With what a client or proxy says in X-Request-Timeout-Ms: all has to be done by then. ApiError for
        no number of milliseconds."""
        if header is None:
            return self
        text = header.strip()
        if not (
            text.isascii() and text.isdigit() and 0 < len(text) < 12 and 0 < int(text) <= MAX_MS
        ):
            raise ApiError(
                400,
                f"X-Request-Timeout-Ms must be whole milliseconds from 1 to {MAX_MS}, not {text[:40]!r}",
                param="X-Request-Timeout-Ms",
                code="invalid_value",
            )
        return self.within(int(text) / 1e3)

    def within(self, seconds: float | None) -> "Terms":
        """All has to be done in so many seconds, too; None adds nothing."""
        if seconds is None:
            return self
        if self.done_within is not None:
            seconds = min(seconds, self.done_within)
        return replace(self, done_within=seconds)

    def after(self, seconds: float) -> "Terms":
        """What is left of the times when `seconds` are over."""

        def left(within: float | None) -> float | None:
            return None if within is None else within - seconds

        return replace(
            self, first_within=left(self.first_within), done_within=left(self.done_within)
        )

    def spare(self, first: float, done: float) -> float:
        """Seconds that are to spare if the first token comes after `first` and the last after `done`; none is negative."""
        pairs = ((self.first_within, first), (self.done_within, done))
        left = [within - seconds for within, seconds in pairs if within is not None]
        return max(0.0, min(left, default=math.inf))

    def by_default(self, first_within: float | None) -> "Terms":
        """An interactive request that asks for no time to its first token is held to the server's."""
        if self.first_within is not None or self.priority is Priority.BATCH:
            return self
        return replace(self, first_within=first_within)
