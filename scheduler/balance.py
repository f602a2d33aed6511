"""How many layers each stage had better have, where an even share leaves the fastest ones waiting.

For a number of sequences and a layout, a stage's time grows with its layers: those beyond its memory
stream, at the speed of its own drive and link. So layers are dealt out one by one, each to the stage that
has it done first, which is the split whose slowest stage is the fastest. Layers are taken to be alike, a
stage's resources to work beside each other, and the result is only a proposal: the planner fills, predicts
and simulates it like any other.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf

from headrace.scheduler.decode import (
    GIGA,
    Decode,
    head_seconds,
    layer_seconds,
)
from headrace.scheduler.experts import reached, transit_slots
from headrace.scheduler.inputs import Budget, DeviceProfile
from headrace.scheduler.memory import Cache, Layout, without_weights
from headrace.scheduler.problem import Problem

MOST_SPLITS = 3
"""Uneven splits of a kind of layout that are planned in full."""

HALVINGS = 10
"""Splits are sought for as many sequences as are wanted, half as many, and so on."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """What a stage takes for `n` layers: memory is `fixed` + n * `layer_memory` beside weights."""

    profile: DeviceProfile
    budget: Budget
    fixed: float
    layer_memory: float
    ring: float
    held: float  # bytes of a layer, without its experts where they are apart
    experts: float  # bytes of a layer's experts, where they are apart
    reached: float  # the share of these that a pass loads if none is at hand
    busy: float  # seconds of a layer's computing in a pass
    head: float  # and of the head's
    resident: int | None

    def seconds(self, n: int) -> float:
        """Of one pass; inf where they do not fit."""
        room = self.budget.device_memory - self.fixed - n * self.layer_memory
        if self.resident is not None:
            kept = min(n, self.resident)
            if kept * self.held + (self.ring if kept < n else 0.0) > room:
                return inf
        elif n * self.held <= room:
            kept = n
        elif self.ring and room >= self.ring:
            kept = min(n - 1, int((room - self.ring) / self.held))
        else:
            return inf
        left = room - kept * self.held - (self.ring if kept < n else 0.0)
        host, nvme = self._loads(n, kept, left)
        crossing = host + (nvme if self.profile.kind == "cuda" else 0.0)
        return max(
            nvme / (self.profile.nvme_gbps * GIGA),
            crossing / (self.profile.host_gbps * GIGA),
            n * self.busy + self.head,
        )

    def _loads(self, n: int, kept: int, left: float) -> tuple[float, float]:
        """Bytes that a pass loads from host RAM and from the drive."""
        room = float(self.budget.host_weights)
        pinned = min(n - kept, int(room / self.held))
        host, nvme = pinned * self.held, (n - kept - pinned) * self.held
        if self.experts:
            missing = max(0.0, n * self.experts - left)
            in_host = min(missing, room - host)
            host += in_host * self.reached
            nvme += (missing - in_host) * self.reached
        return host, nvme


def _stages(problem: Problem, layout: Layout, cache: Cache) -> list[_Stage]:
    shape = problem.shape
    held = shape.held_bytes(split=layout.split)
    decode = Decode.of(layout, cache, problem.context)
    layers = range(shape.num_layers)
    experts, share = 0.0, 0.0
    if layout.split:
        own = [one for one in map(shape.experts_of, layers) if one]
        experts = sum(one.count * one.expert_bytes for one in own) / shape.num_layers
        share = max(reached(one, decode.rows * decode.micro_batches) / one.count for one in own)
    # More micro-batches under way than stages, or all of them wait for each other.
    idle = max(1.0, layout.num_stages / (decode.micro_batches * layout.passes_in_flight))
    found = []
    for stage, (profile, budget) in enumerate(zip(problem.profiles, problem.budgets, strict=True)):
        one, all_of = (
            without_weights(shape, _with_layers(layout, n), stage, cache).device
            for n in (1, shape.num_layers)
        )
        a_layer = (all_of - one) / max(1, shape.num_layers - 1)
        transit = 0
        if layout.split:
            slots = transit_slots(shape, layout.visits, stage, layout.micro_batches)
            transit = slots * shape.expert_bytes
        busy = sum(layer_seconds(shape, i, decode, profile) for i in layers) / shape.num_layers
        head = 0.0
        if stage == layout.visits[-1].stage:
            head = head_seconds(shape, decode, profile)
        found.append(
            _Stage(
                profile=profile,
                budget=budget,
                fixed=one - a_layer + transit,
                layer_memory=a_layer,
                ring=layout.ring_slots * max(held),
                held=sum(held) / shape.num_layers,
                experts=experts,
                reached=share,
                busy=busy * decode.micro_batches * idle,
                head=head * decode.micro_batches * idle,
                resident=layout.resident,
            )
        )
    return found


def _with_layers(layout: Layout, count: int) -> Layout:
    return replace(layout, layers=(tuple(range(count)),) * layout.num_stages)


def balanced(
    problem: Problem, layout: Layout, cache: Cache
) -> tuple[tuple[int, ...], float] | None:
    """Layers of each stage with room for `cache`, and the slowest stage's seconds; None if none fits."""
    stages = _stages(problem, layout, cache)
    counts = [1] * len(stages)
    times = [stage.seconds(1) for stage in stages]
    queue = [(stage.seconds(2), i) for i, stage in enumerate(stages)]
    heapq.heapify(queue)
    for _ in range(problem.shape.num_layers - len(stages)):
        times_with, i = heapq.heappop(queue)
        counts[i] += 1
        times[i] = times_with
        heapq.heappush(queue, (stages[i].seconds(counts[i] + 1), i))
    slowest = max(times)
    return None if slowest == inf else (tuple(counts), slowest)


def splits(
    problem: Problem, layout: Layout, caches: Sequence[Cache] = ()
) -> Iterator[tuple[int, ...]]:
    """Uneven splits for layouts like this one, the most promising first: for `caches`, which some layout
    had, and for ever fewer sequences."""
    wanted = problem.wanted(layout)
    tried = [*caches, *(problem.cache(wanted >> i) for i in range(HALVINGS) if wanted >> i)]
    rates: dict[tuple[int, ...], float] = {}
    for cache in tried:
        found = balanced(problem, layout, cache)
        if found is not None:
            counts, seconds = found
            rate = cache.in_all / seconds if seconds else inf
            rates[counts] = max(rate, rates.get(counts, 0.0))
    ranked = sorted(rates, key=lambda counts: (-rates[counts], counts))
    yield from ranked[:MOST_SPLITS]
