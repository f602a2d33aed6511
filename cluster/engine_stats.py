"""What an engine has done since it started."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from headrace.cluster.job_report import Work
from headrace.cluster.recovered import Recovery
from headrace.scheduler.adapters import AdapterStats
from headrace.scheduler.kv_stats import KVStats
from headrace.scheduler.plan import Pass, PassResult, StageTimes
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.speculation import DraftCounts

LAST_RECOVERIES = 64


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine started; `stages` sums each stage's times over all passes.

    `passes` are those that computed something, and `tokens` what they computed; `kv` says where pages are
    and what was found of them, `drafts` what was guessed and how much of it was right, `adapter_slots` what
    is in these and was brought there; `adapter_wait_seconds` sums up how long each one waited for a slot;
    `recoveries` are the last ones of `num_recoveries`. After `moves` to another ring `stages` are those of
    the last one, which began with the totals of `ring_start`. `contexts` sums up how many tokens each slice
    of a pass had behind it and computed, `slice_pages` the KV pages that hold them; `longest` is the most that
    one had.
    """

    num_stages: int
    passes: int = 0
    tokens: int = 0
    contexts: int = 0
    slice_pages: int = 0
    longest: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    busy_seconds: float = 0.0
    bound_seconds: float = 0.0
    kv: KVStats = field(default_factory=KVStats)
    drafts: DraftCounts = field(default_factory=DraftCounts)
    adapter_slots: AdapterStats = field(default_factory=AdapterStats)
    adapter_wait_seconds: float = 0.0
    num_recoveries: int = 0
    recoveries: deque[Recovery] = field(default_factory=lambda: deque(maxlen=LAST_RECOVERIES))
    moves: int = 0
    stages: list[StageTimes] = field(init=False)
    # Totals when the ring began, and how long the stages of earlier ones were idle: one value, for others read both.
    _before: tuple[Work, dict[int, float]] = field(init=False)

    def __post_init__(self) -> None:
        self.stages = _nothing_done(self.num_stages)
        self._before = Work.of(self), {}

    @property
    def ring_start(self) -> Work:
        return self._before[0]

    def moved(self, num_stages: int) -> None:
        """Other stages go on, so many; what each did begins anew."""
        stages, idle = _nothing_done(num_stages), dict(enumerate(self.idle_seconds()))
        self.moves += 1
        start = replace(Work.of(self), stages=tuple(stages))
        # First: who has the new stages has what was before them, too.
        self._before = start, self._before[1] | idle
        self.num_stages, self.stages = num_stages, stages

    def idle_seconds(self) -> list[float]:
        """How long each stage had no pass while the engine was busy, with those of earlier rings that had its
        number. Any thread may ask."""
        stages = self.stages
        start, earlier = self._before
        busy = self.busy_seconds - start.busy_seconds
        # Passes overlap, and a reading falls between two.
        return [
            earlier.get(stage, 0.0) + max(0.0, busy - times.total)
            for stage, times in enumerate(stages)
        ]

    def recovered(self, recovery: Recovery) -> None:
        self.num_recoveries += 1
        self.recoveries.append(recovery)

    def look(self, scheduler: Scheduler) -> None:
        """Take over what a scheduler counts."""
        self.kv = scheduler.kv_stats()
        self.drafts = scheduler.speculation.counts
        self.adapter_slots = scheduler.adapter_stats()

    def add(self, a_pass: Pass, results: Sequence[PassResult]) -> None:
        self.passes += bool(a_pass.micro_batches)
        self.tokens += a_pass.num_tokens
        for batch in a_pass.micro_batches:
            ends = [piece.end for piece in batch.slices]
            self.contexts += sum(ends)
            self.longest = max([self.longest, *ends])
            self.slice_pages += sum(piece.num_pages for piece in batch.slices)
        for result in results:
            stage = result.times.stage
            self.stages[stage] = self.stages[stage].plus(result.times)


def _nothing_done(num_stages: int) -> list[StageTimes]:
    return [StageTimes(i, 0.0, 0.0, 0.0, 0, 0) for i in range(num_stages)]
