"""Why a run was as fast as it was, and what each change would buy."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from headrace.cluster.explain.changes import changes
from headrace.cluster.explain.report import RunReport
from headrace.scheduler.errors import DoesNotFitError
from headrace.scheduler.expectation import plan_seconds
from headrace.scheduler.inputs import DEFAULT_CONTEXT
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan_inputs import PlanInputs

LEAST_GAIN = 1.02
MUCH = 0.25
"""A share of the time that stages waited for weights, from which on what a pass took longer than expected is
put down to loads."""

NEAR = 1.15
"""A run that took no more than so many times what was expected was bound as planned."""

FEWER = 0.95
BISECTIONS = 30
GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Gain:
    """`factor` times the tokens a second; `tokens_per_second` by the plan, as far as it was right so far."""

    what: str
    factor: float
    tokens_per_second: float
    bound_by: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """`measured` and `expected` are seconds in which each of `sequences` advances by one token, None where
    no pass had decodes only. `waits` are shares of the stages' time: for weights, for each other, for
    KV pages. `blamed` is what the difference was put down to before changes were planned."""

    plan: Plan
    report: RunReport
    sequences: int
    measured: float | None
    expected: float
    waits: dict[str, float]
    streamed_gbps: float
    blamed: str
    gains: tuple[Gain, ...]

    @property
    def ratio(self) -> float:
        """How many times longer it took than expected."""
        return self.measured / self.expected if self.measured else 1.0


def explain(report: RunReport) -> Explanation:
    """Plans again, as the run did and with each change. DoesNotFitError for a report of other software."""
    inputs = report.inputs
    plan = inputs.plan()
    found = _Compared.of(report, plan)
    waits = _waits(report)
    calibrated, blamed = _calibrated(found, inputs, waits["weights"])
    moved = sum(times.nvme_bytes + times.host_bytes for times in report.stages)
    return Explanation(
        plan=plan,
        report=report,
        sequences=found.sequences,
        measured=found.measured,
        expected=found.seconds(inputs),
        waits=waits,
        streamed_gbps=moved / GIGA / (report.busy_seconds or 1.0),
        blamed=blamed,
        gains=tuple(_gains(report, found, calibrated)),
    )


@dataclass(frozen=True, slots=True)
class _Compared:
    """What ran: a plan, with so many sequences at a context, and what a round of them took."""

    plan: Plan
    sequences: int
    context: int
    measured: float | None

    @classmethod
    def of(cls, report: RunReport, plan: Plan) -> "_Compared":
        prediction, decode = plan.prediction, report.decode
        given = report.inputs.workload.context or DEFAULT_CONTEXT
        if decode is None:
            return cls(plan, prediction.sequences, given, None)
        sequences = min(decode.sequences * plan.passes_in_flight, prediction.sequences)
        return cls(plan, sequences, decode.context, decode.seconds * plan.passes_in_flight)

    def seconds(self, inputs: PlanInputs) -> float:
        """A round of what ran, by the model."""
        return plan_seconds(
            self.plan, inputs.shape, inputs.profiles, inputs.links, self.sequences, self.context
        )


def _waits(report: RunReport) -> dict[str, float]:
    total = sum(times.total for times in report.stages) or 1.0
    return {
        "weights": sum(times.weights_wait for times in report.stages) / total,
        "other stages": sum(times.link_wait for times in report.stages) / total,
        "KV pages": sum(times.kv_wait for times in report.stages) / total,
    }


def _calibrated(found: _Compared, inputs: PlanInputs, waited: float) -> tuple[PlanInputs, str]:
    """The inputs with which the model says what was measured.

    Stages that wait for weights for much of the time tell that drives and links were slower than when
    they were probed, others that computing was, or all that is around it.
    """
    measured = found.measured
    expected = found.seconds(inputs)
    if measured is None or measured <= expected:
        return inputs, ""
    if waited >= MUCH:
        factor = _solve(lambda by: found.seconds(_slower(inputs, by)), 1.0, measured, expected)
        return _slower(inputs, factor), f"drives and links {factor:.2f} times slower than probed"
    factor = _solve(lambda by: found.seconds(_busier(inputs, by)), 0.0, measured, expected)
    return _busier(inputs, factor), f"{factor * 1e3:.2f} ms more for each layer's computing"


def _solve(
    seconds: Callable[[float], float], low: float, measured: float, expected: float
) -> float:
    """Where `seconds`, which grow, reach `measured`."""
    high = low + max(measured, measured / expected)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if seconds(middle) < measured:
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


def _busier(inputs: PlanInputs, seconds: float) -> PlanInputs:
    profiles = tuple(replace(p, layer_seconds=p.layer_seconds + seconds) for p in inputs.profiles)
    return replace(inputs, profiles=profiles)


def _gains(report: RunReport, found: _Compared, inputs: PlanInputs) -> list[Gain]:
    """By the calibrated `inputs`, against the plan that ran with all the sequences that it has room for."""
    plan = found.plan
    whole = replace(
        found,
        sequences=plan.prediction.sequences,
        context=min(inputs.workload.context or DEFAULT_CONTEXT, inputs.shape.max_context),
    )
    planned = whole.sequences / whole.seconds(inputs)
    ran = found.sequences / (found.measured or found.seconds(inputs))
    gains = []
    if found.sequences < FEWER * whole.sequences and planned > LEAST_GAIN * ran:
        what = f"keep {whole.sequences} sequences running, for which there is room"
        gains.append(Gain(what, planned / ran, planned, plan.prediction.bound_by))
    again = inputs.plan().prediction
    if again.expected_rate > LEAST_GAIN * planned:
        factor = again.expected_rate / planned
        what = "the same machines, planned for what was measured"
        gains.append(Gain(what, factor, ran * factor, again.bound_by))
    base = max(planned, again.expected_rate)  # changes are more than what planning again brings
    for change in changes(inputs, plan, report.alternatives):
        try:
            other = change.inputs.plan().prediction
        except DoesNotFitError:
            continue
        factor = other.expected_rate / base
        if factor > LEAST_GAIN:
            rate = ran * other.expected_rate / planned
            gains.append(Gain(change.what, factor, rate, other.bound_by))
    return sorted(gains, key=lambda gain: -gain.factor)
