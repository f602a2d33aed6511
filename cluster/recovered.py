"""What recovering a ring took."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recovery:
    """The `stages` that have new processes, after so many rounds, and seconds by phase."""

    cause: str
    stages: tuple[int, ...]
    rounds: int
    phases: Mapping[str, float]
    requests: int = 0

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
