"""Prefill and decode: what they took, what they streamed, and what bound them."""

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.cluster.bench.bounds import Bound, decode_bound, prefill_bound
from headrace.cluster.bench.driver import Steady
from headrace.cluster.bench.needed import Bytes, cold_bytes, expert_bytes, layer_bytes
from headrace.scheduler.inputs import DeviceProfile, ModelShape
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan import StageTimes


@dataclass(frozen=True, slots=True)
class Phase:
    """Seconds that `tokens` took, and those that they could not have been faster than.

    `needed_bytes` of weights had to be streamed for them and `moved_bytes` were.
    """

    seconds: float
    tokens: int
    bound: Bound
    needed_bytes: int
    moved_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def share(self) -> float | None:
        return self.bound.share(self.seconds)


@dataclass(frozen=True, slots=True)
class Measured:
    """A run of `batch` sequences: its plan, what it was made from, and what the driver saw."""

    plan: Plan
    shape: ModelShape
    profile: DeviceProfile
    batch: int
    found: Steady

    def prefill(self, prompt: int) -> Phase:
        """All prompts of `prompt` tokens."""
        found, passes = self.found, self.found.prefill_passes
        experts = expert_bytes(self.plan, found.prefill_stages, passes)
        bound = prefill_bound(self.plan, self.shape, self.profile, self.batch, prompt, experts)
        tokens = self.batch * prompt
        needed, moved = self._needed(experts, passes), _moved(found.prefill_stages)
        return Phase(found.prefill_seconds, tokens, bound, needed, moved)

    def decode(self, context: int) -> Phase:
        """A round at `context` tokens a sequence."""
        found, passes = self.found, self.plan.passes_in_flight
        experts = expert_bytes(self.plan, found.stages, passes)
        cold = cold_bytes(found.stages)
        bound = decode_bound(
            self.plan, self.shape, self.profile, self.batch, context, experts, cold
        )
        needed, moved = self._needed(experts, passes), _moved(found.stages)
        return Phase(found.seconds, round(found.tokens), bound, needed, moved)

    def _needed(self, experts: Sequence[Bytes], passes: int) -> int:
        return round(sum(part.both for part in (*layer_bytes(self.plan, passes), *experts)))


def _moved(stages: Sequence[StageTimes]) -> int:
    return sum(times.nvme_bytes + times.host_bytes for times in stages)
