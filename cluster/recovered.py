"""What recovering a ring took."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Recovery:
    """The `stages` that have new processes, after so many rounds, and seconds by phase. It `ended` at that time, on
    time.monotonic."""

    cause: str
    stages: tuple[int, ...]
    rounds: int
    phases: Mapping[str, float]
    requests: int = 0
    ended: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    def __str__(self) -> str:
        what = f"stages {', '.join(map(str, self.stages))}" if self.stages else "no stage"
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.phases.items())
        return (
            f"recovered in {self.seconds:.1f} s ({times}): {what} replaced, {self.requests} requests"
            f" computed again. {self.cause}"
        )
