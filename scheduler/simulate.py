"""A discrete-event model of passes going round the ring: checks the planner, explains the bound."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.scheduler.placement import Placement, Tier

ROUNDS = 6
"""Simulated rounds of all passes in flight; the last two are measured, the others fill the ring."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of loading each layer (0 when resident), of computing each layer for one micro-batch,
    and of one micro-batch's hop to another stage. `turnaround` is what lies between the end of a
    pass and the start of the one that needs its samples: sampling, committing, calling the stages,
    or handing over what was drawn where the stages have been called before.
    """

    load: tuple[float, ...]
    compute: tuple[float, ...]
    hop: float
    turnaround: float = 0.0


@dataclass(slots=True)
class _Loader:
    """One stage's ring. A drive and a host link serve it, each one load at a time.

    Loads are issued in the order of use, each as soon as the slot of the load `slots` places before
    it is released.
    """

    slots: int
    released: list[float] = field(default_factory=list)
    issued: int = 0
    busy: dict[Tier, float] = field(default_factory=dict)

    def load(self, tier: Tier, seconds: float) -> float:
        """When the next load ends."""
        wraps = self.issued - self.slots
        assert wraps < len(self.released), "a visit streams more layers than the ring has slots"
        free = self.released[wraps] if wraps >= 0 else 0.0
        self.issued += 1
        self.busy[tier] = max(free, self.busy.get(tier, 0.0)) + seconds
        return self.busy[tier]

    def release(self, count: int, time: float) -> None:
        self.released.extend([time] * count)


def simulate(
    placement: Placement,
    timing: Timing,
    *,
    ring_slots: Sequence[int],
    micro_batches: int,
    passes_in_flight: int,
) -> float:
    """Steady seconds in which every sequence advances by one token: `passes_in_flight` passes.

    A pass starts when the pass `passes_in_flight` before it has left the last visit and been turned
    round, while the loads for it go on as far as the ring has slots. A stage
    computes passes in order, visits in ring order and micro-batches one after the other; a visit's
    slots are released after its last micro-batch.
    """
    loaders = [_Loader(slots) for slots in ring_slots]
    idle = [0.0] * placement.num_stages  # when each stage has finished what came before
    ends: list[float] = []
    for step in range(ROUNDS * passes_in_flight):
        start = (
            ends[step - passes_in_flight] + timing.turnaround if step >= passes_in_flight else 0.0
        )
        ready = [start] * micro_batches
        stage_before = placement.first_stage
        for visit in placement.visits:
            if visit.stage != stage_before:
                ready = [time + timing.hop for time in ready]
            stage_before = visit.stage
            loader = loaders[visit.stage]
            streamed = [i for i in visit.layers if placement.tiers[i] is not Tier.DEVICE]
            loaded = {i: loader.load(placement.tiers[i], timing.load[i]) for i in streamed}
            now = idle[visit.stage]
            for batch in range(micro_batches):
                now = max(now, ready[batch])
                for layer in visit.layers:
                    now = max(now, loaded.get(layer, 0.0)) + timing.compute[layer]
                ready[batch] = now
            idle[visit.stage] = now
            loader.release(len(streamed), now)
        ends.append(max(ready) + (timing.hop if placement.num_stages > 1 else 0.0))
    return (ends[-1] - ends[-1 - 2 * passes_in_flight]) / 2
