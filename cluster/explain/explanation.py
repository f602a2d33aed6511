"""Why a run was as fast as it was, and what each change would buy."""

from dataclasses import dataclass

from headrace.cluster.explain.changes import changes
from headrace.cluster.explain.report import RunReport
from headrace.scheduler.errors import DoesNotFitError
from headrace.scheduler.expectation import plan_seconds
from headrace.scheduler.placement import Plan

LEAST_GAIN = 1.02
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
    KV pages."""

    plan: Plan
    report: RunReport
    sequences: int
    measured: float | None
    expected: float
    waits: dict[str, float]
    streamed_gbps: float
    gains: tuple[Gain, ...]

    @property
    def ratio(self) -> float:
        """How many times longer it took than expected."""
        return self.measured / self.expected if self.measured else 1.0


def explain(report: RunReport) -> Explanation:
    """Plans again, as the run did and with each change. DoesNotFitError for a report of other software."""
    inputs = report.inputs
    plan = inputs.plan()
    sequences, measured = plan.prediction.sequences, None
    expected = plan.prediction.expected_seconds
    if report.decode is not None:
        passes = plan.passes_in_flight
        sequences = min(report.decode.sequences * passes, sequences)
        measured = report.decode.seconds * passes
        context = report.decode.context
        expected = plan_seconds(
            plan, inputs.shape, inputs.profiles, inputs.links, sequences, context
        )
    ratio = measured / expected if measured else 1.0
    total = sum(times.total for times in report.stages) or 1.0
    waits = {
        "weights": sum(times.weights_wait for times in report.stages) / total,
        "other stages": sum(times.link_wait for times in report.stages) / total,
        "KV pages": sum(times.kv_wait for times in report.stages) / total,
    }
    moved = sum(times.nvme_bytes + times.host_bytes for times in report.stages)
    return Explanation(
        plan=plan,
        report=report,
        sequences=sequences,
        measured=measured,
        expected=expected,
        waits=waits,
        streamed_gbps=moved / GIGA / (report.busy_seconds or 1.0),
        gains=tuple(_gains(report, plan, sequences / expected, ratio)),
    )


def _gains(report: RunReport, plan: Plan, rate: float, ratio: float) -> list[Gain]:
    planned = plan.prediction.expected_rate
    found = []
    if planned > LEAST_GAIN * rate:
        what = f"keep {plan.prediction.sequences} sequences running, for which there is room"
        factor = planned / rate
        found.append(Gain(what, factor, planned / ratio, plan.prediction.bound_by))
    for change in changes(report.inputs, plan, report.alternatives):
        try:
            other = change.inputs.plan().prediction
        except DoesNotFitError:
            continue
        factor = other.expected_rate / planned
        if factor > LEAST_GAIN:
            found.append(Gain(change.what, factor, other.expected_rate / ratio, other.bound_by))
    return sorted(found, key=lambda gain: -gain.factor)
