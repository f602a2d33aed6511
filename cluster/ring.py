"""What makes up a ring that runs, seen from the engine: it may get another one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headrace.cluster.pipeline import Pipeline
from headrace.cluster.recovery import RingRecovery
from headrace.cluster.replacement import StageReplacer
from headrace.cluster.stage_traces import TraceSource
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan_inputs import PlanInputs

if TYPE_CHECKING:
    from headrace.cluster.stage_logs import StageLogs


@dataclass(frozen=True, slots=True)
class Ring:
    """Stages that run passes of a `plan`. They can be replaced and recovered where they are processes, and
    `logs` are what they have on NVMe; `inputs` are what the plan was made from, if that is known;
    `traces` record what they do."""

    plan: Plan
    pipeline: Pipeline
    logs: "StageLogs | None" = None
    replacer: StageReplacer | None = None
    recovery: RingRecovery | None = None
    inputs: PlanInputs | None = None
    traces: TraceSource | None = None


Rebuild = Callable[[], Ring]
"""Ends what is left of a ring and starts another one, of fewer stages, where the cluster has room for them.
HeadraceError when it has not."""
