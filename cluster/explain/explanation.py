"""Why a run was as fast as it was, and what each change would buy."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from headrace.cluster.explain.calibration import MUCH, Calibrated, Compared, rows
from headrace.cluster.explain.changes import Change, changes
from headrace.cluster.explain.load import FEWER, Load
from headrace.cluster.explain.report import RunReport
from headrace.scheduler.errors import DoesNotFitError
from headrace.scheduler.expectation import plan_seconds
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan_inputs import PlanInputs

__all__ = ["MUCH", "NEAR", "Explanation", "Gain", "explain"]

LEAST_GAIN = 1.02

NEAR = 1.15
"""A run that took no more than so many times what was expected was bound as planned."""

MANY = 1000
"""So many times what runs at once is a job without an end."""

GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Gain:
    """`factor` times the job's tokens a second if what passes took longer than expected grows with their
    sequences, `at_most` if it does not; `tokens_per_second` of the former while `sequences` run at once."""

    what: str
    factor: float
    at_most: float
    tokens_per_second: float
    sequences: int
    bound_by: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """`measured` and `expected` are seconds in which each of the `sequences` advances by one token, None where
    no pass had decodes only. `waits` are shares of the stages' time: for weights, for each other, for
    KV pages. `load` says which sequences those were, and how many more there were. `blamed` is what the
    difference was put down to before changes were planned."""

    plan: Plan
    report: RunReport
    load: Load
    measured: float | None
    expected: float
    waits: dict[str, float]
    streamed_gbps: float
    blamed: str
    gains: tuple[Gain, ...]

    @property
    def sequences(self) -> int:
        return self.load.sequences

    @property
    def ratio(self) -> float:
        """How many times longer it took than expected."""
        return self.measured / self.expected if self.measured else 1.0


def explain(report: RunReport) -> Explanation:
    """Plans again, as the run did and with each change. DoesNotFitError for a report of other software."""
    inputs = report.inputs
    plan = inputs.plan()
    found = Compared.of(report, plan)
    waits = _waits(report)
    calibrated = found.calibrated(inputs, waits["weights"])
    moved = sum(times.nvme_bytes + times.host_bytes for times in report.stages)
    return Explanation(
        plan=plan,
        report=report,
        load=found.load,
        measured=found.measured,
        expected=found.seconds(inputs),
        waits=waits,
        streamed_gbps=moved / GIGA / (report.busy_seconds or 1.0),
        blamed=calibrated.told,
        gains=tuple(_gains(report, found, calibrated)),
    )


def _waits(report: RunReport) -> dict[str, float]:
    total = sum(times.total for times in report.stages) or 1.0
    return {
        "weights": sum(times.weights_wait for times in report.stages) / total,
        "other stages": sum(times.link_wait for times in report.stages) / total,
        "KV pages": sum(times.kv_wait for times in report.stages) / total,
    }


def _gains(report: RunReport, found: Compared, calibrated: Calibrated) -> list[Gain]:
    """Against the run itself, with all the requests that it had."""
    plan, load, inputs = found.plan, found.load, calibrated.inputs
    expected = partial(_expected, found, calibrated)
    ran = load.rate(load.sequences, lambda n: expected(plan, inputs, load.context, n))
    gains = []
    room = load.room(plan)
    if load.sequences < FEWER * room and not load.waited:
        change = Change(f"more requests: there is room for {room} at once", inputs)
        more = replace(load, requests=MANY * room, waited=True)
        gains.append(_gain(change, more, load.sequences / found.seconds(inputs), expected))
    again = _gain(
        Change("the same machines, planned for what was measured", inputs), load, ran, expected
    )
    gains.append(again)
    base = ran * max(1.0, again.factor)  # changes are more than what planning again brings
    for change in changes(inputs, plan, report.alternatives, load):
        try:
            gains.append(_gain(change, load.resized(change.length), base, expected))
        except DoesNotFitError:
            continue
    worth = [one for one in gains if one.at_most > LEAST_GAIN]
    return sorted(worth, key=lambda one: (-one.factor, -one.at_most))


def _gain(change: Change, load: Load, base: float, expected: Callable[..., float]) -> Gain:
    """Over `base` tokens a second of the whole job. DoesNotFitError when there is no such plan."""
    plan = change.inputs.plan()
    sequences = load.at_once(plan)

    def seconds(number: int, *, grows: bool = True) -> float:
        return expected(plan, change.inputs, load.context, number, grows=grows)

    factor = load.rate(sequences, seconds) / base
    at_most = load.rate(sequences, partial(seconds, grows=False)) / base
    rate, bound_by = sequences / seconds(sequences), plan.prediction.bound_by
    return Gain(change.what, factor, at_most, rate, sequences, bound_by)


def _expected(
    found: Compared,
    calibrated: Calibrated,
    plan: Plan,
    inputs: PlanInputs,
    context: int,
    sequences: int,
    *,
    grows: bool = True,
) -> float:
    """Seconds of a round of `sequences` in another plan; what could not be explained `grows` where
    micro-batches have more sequences than those that were measured."""
    if grows:
        times = rows(plan, sequences) / rows(found.plan, found.load.sequences)
        inputs = calibrated.growing(inputs, max(1.0, times))
    return plan_seconds(plan, inputs.shape, inputs.profiles, inputs.links, sequences, context)
