"""What an engine has done since it started."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

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
    the last one.
    """

    num_stages: int
    passes: int = 0
    tokens: int = 0
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

    def __post_init__(self) -> None:
        self.stages = _nothing_done(self.num_stages)

    def moved(self, num_stages: int) -> None:
        """Other stages go on, so many; what each did begins anew."""
        self.num_stages = num_stages
        self.moves += 1
        self.stages = _nothing_done(num_stages)

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
        for result in results:
            stage = result.times.stage
            self.stages[stage] = self.stages[stage].plus(result.times)


def _nothing_done(num_stages: int) -> list[StageTimes]:
    return [StageTimes(i, 0.0, 0.0, 0.0, 0, 0) for i in range(num_stages)]
