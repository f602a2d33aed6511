"""All that a plan is made from, in one piece: to keep beside a run, and to plan again with changes."""

from dataclasses import dataclass

from headrace.scheduler.inputs import Budget, Choices, DeviceProfile, ModelShape, Workload
from headrace.scheduler.links import Links
from headrace.scheduler.placement import Plan
from headrace.scheduler.planner import make_plan


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """One profile and one budget for each stage; `nodes` says which stages share a machine."""

    shape: ModelShape
    profiles: tuple[DeviceProfile, ...]
    budgets: tuple[Budget, ...]
    workload: Workload
    choices: Choices
    links: Links
    nodes: tuple[str, ...]

    def plan(self) -> Plan:
        """Raises DoesNotFitError."""
        return make_plan(
            self.shape, self.profiles, self.budgets, self.workload, self.choices, self.links
        )
