"""What a pass takes at least: the bound that a run is compared with. And what it may take at most."""

from collections import deque
from collections.abc import Sequence

from headrace.scheduler.placement import Plan
from headrace.scheduler.plan import Pass, PassResult

PATIENCE = 20.0
"""A pass may take so many times as long as others have."""

LEAST_PATIENCE = 60.0
"""Seconds that every pass may take: kernels may be compiled for it."""

REMEMBERED = 64
"""Passes that the next one is compared with."""


def least_seconds(
    plan: Plan,
    num_tokens: int,
    experts_loaded: int = 0,
    cold_pages: int = 0,
    sunk_bytes: int = 0,
) -> float:
    """What the binding resource needs for one pass of `num_tokens` tokens, by the plan's terms.

    Weights are moved once a pass whatever it computes, experts of split layers when they had to be
    loaded, and `cold_pages` pages of sequences that have theirs in host RAM or on NVMe, `sunk_bytes` from
    the drives of all stages; arithmetic grows with the pass's tokens. A pass of moves alone needs nothing of the plan's.
    """
    if not num_tokens:
        return 0.0
    prediction, rounds = plan.prediction, plan.passes_in_flight
    share = _streamed_share(plan, experts_loaded) / rounds
    link = (prediction.terms["pcie"] - prediction.cold_seconds) * share
    if cold_pages:
        link += prediction.cold_seconds * cold_pages / max(1, prediction.cold_pages)
    drive = (prediction.terms["nvme"] - prediction.sunk_seconds) * share
    if sunk_bytes:
        drive += prediction.sunk_seconds * sunk_bytes / max(1.0, prediction.sunk_bytes)
    moving = max(drive, link, prediction.terms["hbm"] / rounds)
    return max(moving, prediction.terms["compute"] * num_tokens / prediction.sequences)


def _streamed_share(plan: Plan, experts_loaded: int) -> float:
    """What a pass had to stream, as a share of what was predicted."""
    traffic = plan.prediction.experts
    if traffic is None:
        return 1.0
    layers = sum(plan.nvme_bytes_a_pass) + sum(plan.host_bytes_a_pass)
    predicted = layers + traffic.nvme_bytes + traffic.host_bytes
    needed = layers + experts_loaded * plan.expert_slot_bytes
    return needed / predicted if predicted else 1.0


class PassDeadline:
    """How long a pass may take: `most` seconds, and no more than PATIENCE times as long, by what the plan
    says that they take at least, as the slowest of those before it."""

    def __init__(self, plan: Plan, most: float) -> None:
        self._plan, self._most = plan, most
        self._ratios: deque[float] = deque(maxlen=REMEMBERED)

    def of(self, a_pass: Pass) -> float:
        """Seconds."""
        least = self._least(a_pass)
        if not self._ratios or not least:
            return self._most
        return min(self._most, max(LEAST_PATIENCE, PATIENCE * max(self._ratios) * least))

    def learn(self, a_pass: Pass, results: Sequence[PassResult]) -> None:
        """A pass has returned."""
        if least := self._least(a_pass):
            self._ratios.append(max(result.times.total for result in results) / least)

    def _least(self, a_pass: Pass) -> float:
        return least_seconds(self._plan, a_pass.num_tokens, cold_pages=a_pass.num_cold)
