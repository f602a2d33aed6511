"""What a phase had to read, which is less than what it moved where experts were loaded unasked."""

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.scheduler.placement import Plan
from headrace.scheduler.plan import StageTimes


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes that one stage read: of its drive, and of its host RAM."""

    nvme: float
    host: float

    @property
    def both(self) -> float:
        return self.nvme + self.host


def layer_bytes(plan: Plan, passes: int) -> tuple[Bytes, ...]:
    """What `passes` passes stream of layers, stage by stage; of split ones, without their experts."""
    pairs = zip(plan.nvme_bytes_a_pass, plan.host_bytes_a_pass, strict=True)
    return tuple(Bytes(nvme * passes, host * passes) for nvme, host in pairs)


def expert_bytes(plan: Plan, stages: Sequence[StageTimes], passes: int) -> tuple[Bytes, ...]:
    """What `stages` loaded in `passes` passes of experts that tokens then reached.

    Where those that were loaded came from is only known of all together.
    """
    found = []
    for times, layers in zip(stages, layer_bytes(plan, passes), strict=True):
        nvme, host = times.nvme_bytes - layers.nvme, times.host_bytes - layers.host
        reached = times.experts_loaded * plan.expert_slot_bytes
        share = min(1.0, reached / (nvme + host)) if nvme + host > 0 else 0.0
        found.append(Bytes(share * nvme, share * host))
    return tuple(found)


def cold_bytes(stages: Sequence[StageTimes]) -> tuple[Bytes, ...]:
    """What `stages` brought of KV pages in host RAM and on NVMe, once for each token of their sequences."""
    return tuple(
        Bytes(times.kv_sunk_bytes, max(0, times.kv_cold_bytes - times.kv_sunk_bytes))
        for times in stages
    )
