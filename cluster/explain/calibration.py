"""What ran, compared with the planner's model of it, and the model made to say what was measured."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from headrace.cluster.explain.load import Load
from headrace.cluster.explain.report import RunReport
from headrace.scheduler.expectation import plan_seconds
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan_inputs import PlanInputs

MUCH = 0.25
"""A share of the time that stages waited for weights, from which on what a pass took longer than expected is
put down to loads."""

BISECTIONS = 40
MOST_DOUBLINGS = 40


@dataclass(frozen=True, slots=True)
class Calibrated:
    """`inputs` with which the model says what was measured, `told` by what; `more` seconds for each layer of a
    micro-batch are part of it."""

    inputs: PlanInputs
    told: str = ""
    more: float = 0.0

    def growing(self, inputs: PlanInputs, times: float) -> PlanInputs:
        """Changed `inputs` if what a layer took more is not a micro-batch's but its sequences', so many `times`
        as many as were measured."""
        return _busier(inputs, (times - 1.0) * self.more)


@dataclass(frozen=True, slots=True)
class Compared:
    """What ran: a plan under a load, and what a round of it took; `emptier` are a round's seconds and
    sequences where these were much fewer."""

    plan: Plan
    load: Load
    measured: float | None
    emptier: tuple[float, int] | None = None

    @classmethod
    def of(cls, report: RunReport, plan: Plan) -> "Compared":
        load, decode, passes = Load.of(report, plan), report.decode, plan.passes_in_flight
        if decode is None:
            return cls(plan, load, None)
        few, emptier = decode.emptier, None
        if few is not None:
            emptier = few.seconds * passes, few.sequences * passes
        return cls(plan, load, decode.seconds * passes, emptier)

    def seconds(self, inputs: PlanInputs, sequences: int | None = None) -> float:
        """A round of what ran, or of so many sequences, by the model."""
        return plan_seconds(
            self.plan,
            inputs.shape,
            inputs.profiles,
            inputs.links,
            self.load.sequences if sequences is None else sequences,
            self.load.context,
        )

    def calibrated(self, inputs: PlanInputs, waited: float) -> Calibrated:
        """The inputs with which the model says what was measured, and what that was put down to.

        Stages that wait for weights for much of the time (a share `waited`) tell that drives and links were
        slower than when they were probed, others that computing was, or all that is around it: for each
        sequence, as far as passes with fewer of them took less time, or else for each layer.
        """
        measured = self.measured
        if measured is None or measured <= self.seconds(inputs):
            return Calibrated(inputs)
        if waited >= MUCH:
            factor = _solve(lambda by: self.seconds(_slower(inputs, by)), 1.0, measured)
            told = f"drives and links {factor:.2f} times slower than probed"
            return Calibrated(_slower(inputs, factor), told)
        told = ""
        times = self._computing(inputs)
        if times > 1.0:
            inputs = _computes_slower(inputs, times)
            told = f"arithmetic {times:.1f} times slower than probed, and "
        more = _solve(lambda by: self.seconds(_busier(inputs, by)), 0.0, measured)
        told += f"{more * 1e3:.2f} ms more for each layer's computing"
        return Calibrated(_busier(inputs, more), told, more)

    def _computing(self, inputs: PlanInputs) -> float:
        """How many times slower arithmetic was, by what fewer sequences took less; 1 where that is unknown."""
        if self.emptier is None or self.measured is None:
            return 1.0
        seconds, fewer = self.emptier

        def grows(by: float) -> float:
            slower = _computes_slower(inputs, by)
            return self.seconds(slower) - self.seconds(slower, fewer)

        grown = self.measured - seconds
        if grown <= grows(1.0):
            return 1.0
        most = _solve(lambda by: self.seconds(_computes_slower(inputs, by)), 1.0, self.measured)
        return min(most, _solve(grows, 1.0, grown))


def rows(plan: Plan, sequences: int) -> float:
    """Sequences in a micro-batch, where so many run at once."""
    a_pass = sequences / plan.passes_in_flight
    return a_pass / min(plan.micro_batches, math.ceil(a_pass))


def _solve(seconds: Callable[[float], float], low: float, wanted: float) -> float:
    """Where `seconds`, which grow, reach `wanted`; where they never do, far out."""
    step = 1.0
    for _ in range(MOST_DOUBLINGS):
        if seconds(low + step) >= wanted:
            break
        step *= 2
    high = low + step
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if seconds(middle) < wanted:
            low = middle
        else:
            high = middle
    return high


def _slower(inputs: PlanInputs, factor: float) -> PlanInputs:
    profiles = tuple(
        replace(p, nvme_gbps=p.nvme_gbps / factor, host_gbps=p.host_gbps / factor)
        for p in inputs.profiles
    )
    return replace(inputs, profiles=profiles)


def _computes_slower(inputs: PlanInputs, factor: float) -> PlanInputs:
    profiles = tuple(replace(p, tflops=p.tflops / factor) for p in inputs.profiles)
    return replace(inputs, profiles=profiles)


def _busier(inputs: PlanInputs, seconds: float) -> PlanInputs:
    profiles = tuple(replace(p, layer_seconds=p.layer_seconds + seconds) for p in inputs.profiles)
    return replace(inputs, profiles=profiles)
