"""What recovering a ring took."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

REPLACED = "replaced"  # stages have new processes
RECONNECTED = "reconnected"  # the same processes have new edges
REPLANNED = "replanned"  # another ring runs, of other stages
KINDS = (REPLACED, RECONNECTED, REPLANNED)


@dataclass(frozen=True, slots=True)
class Recovery:
    """The `stages` that have new processes, after so many rounds, and seconds by phase. It `ended` at that time, on
    time.monotonic. Where another ring took the place of the one that ran, it is `replanned` for so many stages."""

    cause: str
    stages: tuple[int, ...]
    rounds: int
    phases: Mapping[str, float]
    requests: int = 0
    ended: float = field(default_factory=time.monotonic)
    replanned: int | None = None

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def kind(self) -> str:
        """One of KINDS."""
        if self.replanned is not None:
            return REPLANNED
        return REPLACED if self.stages else RECONNECTED

    def __str__(self) -> str:
        what = (
            f"stages {', '.join(map(str, self.stages))} replaced"
            if self.stages
            else "no stage replaced"
        )
        if self.replanned is not None:
            what = f"planned anew for {self.replanned} stages"
        times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.phases.items())
        return (
            f"recovered in {self.seconds:.1f} s ({times}): {what}, {self.requests} requests"
            f" computed again. {self.cause}"
        )
