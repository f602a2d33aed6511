"""A discrete-event model of passes going round the ring: checks the planner, explains the bound."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from headrace.scheduler.placement import Placement, Tier

ROUNDS = 6
"""Simulated rounds of all passes in flight; the last two are measured, the others fill the ring."""


@dataclass(frozen=True, slots=True)
class ExpertTimes:
    """Seconds of loading a split layer's experts once a pass, from the drive and from host RAM.

    A share of them is loaded `ahead` of the router, like the layer itself; the others when the first
    micro-batch comes, which computes with each as it arrives.
    """

    nvme: float
    host: float
    ahead: float

    def part(self, share: float) -> dict[Tier, float]:
        return {Tier.NVME: share * self.nvme, Tier.HOST: share * self.host}


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of loading each layer (0 when resident), of computing each layer for one micro-batch,
    and of one micro-batch's hop to another stage; where stages are not all reached alike, `hops` has
    latency and transfer time of the hop to each visit, the first of them of the way back: a stage
    sends one micro-batch after the other. `turnaround` is what lies between the end of a
    pass and the start of the one that needs its samples: sampling, committing, calling the stages,
    or handing over what was drawn where the stages have been called before. `experts` are those of
    split layers. `cold` is what bringing pages from host RAM takes each layer for each of the last
    `cold_batches` micro-batches, and `sunk` what reading those on NVMe takes the drive.
    """

    load: tuple[float, ...]
    compute: tuple[float, ...]
    hop: float
    turnaround: float = 0.0
    experts: Mapping[int, ExpertTimes] = field(default_factory=dict)
    cold: tuple[float, ...] = ()
    cold_batches: int = 0
    sunk: tuple[float, ...] = ()
    hops: tuple[tuple[float, float], ...] = ()

    def hop_to(self, visit: int) -> tuple[float, float]:
        return self.hops[visit] if self.hops else (self.hop, 0.0)


@dataclass(slots=True)
class _ColdPages:
    """One stage's KV ring in one pass: what the next use needs is asked for when this one begins."""

    loader: "_Loader"
    loads: Sequence[Mapping[Tier, float]]  # seconds of each use of the ring
    arrivals: list[float] = field(default_factory=list)
    taken: int = 0

    def take(self, now: float) -> float:
        """When the next use, for which all else is there `now`, can begin."""
        begins = max(now, self.arrivals[self.taken])
        self.taken += 1
        self.ask(begins)
        return begins

    def ask(self, now: float) -> None:
        if len(self.arrivals) < len(self.loads):
            self.arrivals.append(self.loader.fetch(self.loads[len(self.arrivals)], now))


@dataclass(slots=True)
class _Loader:
    """One stage's ring. A drive and a host link serve it, each one load at a time.

    `order` are the loads of a pass, layer by layer as seconds of each tier. They are issued in the
    order of use, each as soon as the slot of the load `slots` places before it is released.
    """

    order: Sequence[Mapping[Tier, float]]
    slots: int
    released: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    taken: int = 0
    busy: dict[Tier, float] = field(default_factory=dict)

    def take(self) -> float:
        """When the next load ends."""
        while len(self.ends) <= self.taken:
            assert self._free() < inf, "a visit streams more layers than the ring has slots"
            self._issue()
        self.taken += 1
        return self.ends[self.taken - 1]

    def fetch(self, seconds: Mapping[Tier, float], now: float) -> float:
        """When a load ends that is asked for `now`, behind those that have a slot already."""
        while self.order and self._free() <= now:
            self._issue()
        return self._run(seconds, now)

    def release(self, count: int, time: float) -> None:
        self.released.extend([time] * count)

    def _free(self) -> float:
        """When the next load has a slot, as far as that is known."""
        wraps = len(self.ends) - self.slots
        if wraps < 0:
            return 0.0
        return self.released[wraps] if wraps < len(self.released) else inf

    def _issue(self) -> None:
        self.ends.append(self._run(self.order[len(self.ends) % len(self.order)], self._free()))

    def _run(self, seconds: Mapping[Tier, float], start: float) -> float:
        end = start
        for tier, time in seconds.items():
            if time:
                self.busy[tier] = max(start, self.busy.get(tier, 0.0)) + time
                end = max(end, self.busy[tier])
        return end


def _loads(placement: Placement, timing: Timing) -> dict[int, dict[Tier, float]]:
    """Seconds of what each layer loads before it is visited."""
    found: dict[int, dict[Tier, float]] = {}
    for layer, tier in enumerate(placement.tiers):
        experts = timing.experts.get(layer)
        loads: dict[Tier, float] = {} if tier is Tier.DEVICE else {tier: timing.load[layer]}
        if experts is not None and experts.ahead:
            early = experts.part(experts.ahead)
            loads = {t: loads.get(t, 0.0) + seconds for t, seconds in early.items()}
        if loads:
            found[layer] = loads
    return found


def _cold_pages(
    placement: Placement, timing: Timing, loaders: Sequence[_Loader], start: float
) -> list[_ColdPages]:
    """Each stage's ring in a pass that begins at `start`, with the first use's pages asked for."""
    rings = []
    for stage, loader in enumerate(loaders):
        visits = (placement.visits[visit] for visit in placement.visits_of(stage))
        layers = [i for visit in visits for i in visit.layers * timing.cold_batches]
        loads = [{Tier.HOST: timing.cold[i], Tier.NVME: timing.sunk[i]} for i in layers]
        rings.append(_ColdPages(loader, loads))
        rings[-1].ask(start)
    return rings


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
    loads = _loads(placement, timing)
    late = {i: experts.part(1.0 - experts.ahead) for i, experts in timing.experts.items()}
    loaders = [
        _Loader([loads[i] for i in placement.layers_of(stage) if i in loads], slots)
        for stage, slots in enumerate(ring_slots)
    ]
    idle = [0.0] * placement.num_stages  # when each stage has finished what came before
    sent = [0.0] * placement.num_stages
    ends: list[float] = []
    for step in range(ROUNDS * passes_in_flight):
        start = (
            ends[step - passes_in_flight] + timing.turnaround if step >= passes_in_flight else 0.0
        )
        ready = [start] * micro_batches
        rings = _cold_pages(placement, timing, loaders, start)
        warm = micro_batches - timing.cold_batches
        stage_before = placement.first_stage
        for number, visit in enumerate(placement.visits):
            if visit.stage != stage_before:
                sent[stage_before] = _send(ready, sent[stage_before], *timing.hop_to(number))
            stage_before = visit.stage
            loader = loaders[visit.stage]
            loaded = {i: loader.take() for i in visit.layers if i in loads}
            now = idle[visit.stage]
            compute = [timing.compute[i] for i in visit.layers]
            for batch in range(micro_batches):
                now = max(now, ready[batch])
                if 0 < batch < warm:  # the first has waited for all that was loaded
                    for seconds in compute:
                        now += seconds
                    ready[batch] = now
                    continue
                for layer in visit.layers:
                    now = max(now, loaded.get(layer, 0.0))
                    if batch >= warm:
                        now = rings[visit.stage].take(now)
                    late_at = (
                        loader.fetch(late[layer], now) if batch == 0 and layer in late else 0.0
                    )
                    now = max(now + timing.compute[layer], late_at)
                ready[batch] = now
            idle[visit.stage] = now
            loader.release(len(loaded), now)
        ends.append(max(ready) + (timing.hop_to(0)[0] if placement.num_stages > 1 else 0.0))
    return (ends[-1] - ends[-1 - 2 * passes_in_flight]) / 2


def _send(ready: list[float], sent: float, latency: float, transfer: float) -> float:
    """Puts when micro-batches have come in the place of when they were `ready`. Their link was busy until `sent`; until
    when it is then."""
    for batch, time in enumerate(ready):
        sent = max(time, sent) + transfer
        ready[batch] = sent + latency if transfer else time + latency
    return sent
