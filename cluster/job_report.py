"""Where a job stands: the same report is its progress while it runs and its result at the end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from headrace.scheduler.plan import StageTimes
from headrace.scheduler.speculation import DraftCounts


class Stats(Protocol):
    """Totals since the engine started. `bound_seconds` is the least time its passes could take."""

    @property
    def passes(self) -> int: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def output_tokens(self) -> int: ...

    @property
    def busy_seconds(self) -> float: ...

    @property
    def bound_seconds(self) -> float: ...

    @property
    def drafts(self) -> DraftCounts: ...

    @property
    def stages(self) -> Sequence[StageTimes]: ...

    @property
    def moves(self) -> int: ...

    @property
    def ring_start(self) -> "Work":
        """The totals when the ring began that runs now."""


@dataclass(frozen=True, slots=True)
class ComputeSplit:
    """Seconds that one stage computed, by what; the rest of its computing is none of them.

    What CUDA graphs do cannot be told apart.
    """

    dequant: float
    matmul: float
    attention: float
    graphs: float = 0.0

    @property
    def known(self) -> float:
        return self.dequant + self.matmul + self.attention + self.graphs


class JobTrace(Protocol):
    """What a run notes besides its totals, and writes to `file` when it is closed."""

    @property
    def file(self) -> Path: ...

    @property
    def written(self) -> bool: ...

    def close(self) -> None: ...

    def splits(self) -> list[ComputeSplit | None]:
        """Of each stage that answered, once closed."""


@dataclass(frozen=True, slots=True)
class Work:
    """What the engine did over some time: passes, tokens, seconds, guesses and each stage's times.

    It may have had several rings, one after the other: after so many `moves` to another one, `stages` are those
    of the last ring, and what they did since they are its stages.
    """

    passes: int
    prompt_tokens: int
    output_tokens: int
    busy_seconds: float
    bound_seconds: float
    stages: tuple[StageTimes, ...]
    drafts: DraftCounts = field(default_factory=DraftCounts)
    moves: int = 0

    @classmethod
    def of(cls, stats: Stats) -> "Work":
        return cls(
            stats.passes,
            stats.prompt_tokens,
            stats.output_tokens,
            stats.busy_seconds,
            stats.bound_seconds,
            tuple(stats.stages),
            stats.drafts,
            stats.moves,
        )

    def since(self, start: "Work") -> "Work":
        """The work between two readings of the same engine."""
        stages = self.stages
        if self.moves == start.moves:  # else others had done what `start` says
            stages = tuple(a.since(b) for a, b in zip(stages, start.stages, strict=True))
        return Work(
            self.passes - start.passes,
            self.prompt_tokens - start.prompt_tokens,
            self.output_tokens - start.output_tokens,
            self.busy_seconds - start.busy_seconds,
            self.bound_seconds - start.bound_seconds,
            stages,
            self.drafts.since(start.drafts),
            self.moves - start.moves,
        )

    @property
    def share_of_bound(self) -> float | None:
        """1 when every pass took the time that the binding resource needs for it."""
        return self.bound_seconds / self.busy_seconds if self.busy_seconds > 0 else None

    @property
    def nvme_bytes(self) -> int:
        return sum(times.nvme_bytes for times in self.stages)

    @property
    def pcie_bytes(self) -> int:
        """Weights that crossed to the devices: those from NVMe and those from host RAM."""
        return sum(times.nvme_bytes + times.host_bytes for times in self.stages)


@dataclass(frozen=True, slots=True)
class RingWork:
    """What one ring did, and in how many seconds of wall-clock time."""

    work: Work
    seconds: float


@dataclass(frozen=True, slots=True)
class JobReport:
    """Rows of the whole job, and the work of this run of it.

    `resumed` of the finished rows were finished by earlier runs. `running` rows are being
    generated; after a stop they count as not finished. `seconds` is this run's wall-clock time.
    `last_ring` is the part of the ring that runs now, where it took another one's place.
    """

    output: Path
    quarantine: Path
    total: int
    answered: int
    quarantined: int
    resumed: int
    running: int
    stopping: bool
    seconds: float
    work: Work
    last_ring: RingWork | None = None

    @property
    def ring(self) -> RingWork:
        """The part of the ring that runs now."""
        return self.last_ring or RingWork(self.work, self.seconds)

    @property
    def finished(self) -> int:
        return self.answered + self.quarantined

    @property
    def complete(self) -> bool:
        return self.finished == self.total
