"""What each pool would do: its plan, how fast that is and what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.cluster.whatif.hardware import Pool
from headrace.scheduler.errors import DoesNotFitError
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan_inputs import PlanInputs

MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """`plan` is None where the pool cannot hold the model, and `refusal` says why and by how much."""

    pool: Pool
    plan: Plan | None
    refusal: str = ""

    @property
    def price_per_hour(self) -> float:
        return sum(node.count * node.price_per_hour for node in self.pool.nodes)

    @property
    def tokens_per_second(self) -> float:
        return self.plan.prediction.expected_rate if self.plan else 0.0

    def hours(self, tokens: int) -> float:
        """To generate so many tokens with all sequences running all the time."""
        return tokens / self.tokens_per_second / 3600

    def cost(self, tokens: int) -> float:
        return self.hours(tokens) * self.price_per_hour


def outcomes(questions: Sequence[tuple[Pool, PlanInputs]]) -> list[Outcome]:
    """One for each pool, in their order."""
    found = []
    for pool, inputs in questions:
        try:
            found.append(Outcome(pool, inputs.plan()))
        except DoesNotFitError as error:
            found.append(Outcome(pool, None, str(error)))
    return found
