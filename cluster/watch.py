"""Looks whether stages are alive while somebody waits for them."""

import time
from collections.abc import Callable

from headrace.scheduler.errors import StageLostError

MOST_BETWEEN = 2.0
"""Seconds that count between two looks: a machine that was suspended has its stages heard of first."""


class Watch:
    """Stages of which nothing new was heard for `patience` seconds while it looked are lost."""

    def __init__(
        self,
        stages: int,
        beats: Callable[[int], int],
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._beats, self._patience, self._clock = beats, patience, clock
        self._heard = [-1] * stages
        self._silence = [0.0] * stages
        self._looked = clock()

    def check(self) -> None:
        """StageLostError with the stages that are silent."""
        now = self._clock()
        passed, self._looked = min(now - self._looked, MOST_BETWEEN), now
        for stage, before in enumerate(self._heard):
            self._heard[stage] = self._beats(stage)
            is_new = self._heard[stage] != before
            self._silence[stage] = 0.0 if is_new else self._silence[stage] + passed
        silent = tuple(i for i, s in enumerate(self._silence) if s > self._patience)
        if silent:
            named = ", ".join(map(str, silent))
            raise StageLostError(
                f"stage {named} has not been heard of for {self._patience:.0f} s: its process is"
                " stopped, or its machine cannot be reached",
                silent,
            )

    def forget(self) -> None:
        """Begin anew: stages have changed."""
        self._heard = [-1] * len(self._heard)
        self._silence = [0.0] * len(self._silence)
