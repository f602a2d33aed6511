"""What a run cannot be faster than, by the planner's formula and speeds measured beside the run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from headrace.scheduler.inputs import DeviceProfile, ModelShape
from headrace.scheduler.placement import Plan
from headrace.scheduler.predict import Decode, predict

GIGA = 1e9
TOLERANCE = 1.02
"""A run that beats its bound by more shows that the bound was measured too low."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds of each term: "nvme", "pcie", "compute", "hbm", "hops". The largest binds."""

    terms: Mapping[str, float]

    @property
    def bound_by(self) -> str:
        return max(self.terms, key=lambda name: self.terms[name])

    @property
    def seconds(self) -> float:
        return self.terms[self.bound_by]

    def share(self, seconds: float) -> float | None:
        """Of the bound that `seconds` reached; None where the run was faster than the bound."""
        share = self.seconds / seconds
        return share if share <= TOLERANCE else None


def decode_bound(
    plan: Plan, shape: ModelShape, profile: DeviceProfile, sequences: int, context: int
) -> Bound:
    """A round in which `sequences` of `context` tokens advance by one."""
    a_pass = -(-sequences // plan.passes_in_flight)
    micro_batches = min(plan.micro_batches, a_pass)
    return _bound(
        plan, shape, profile, Decode(sequences, context, micro_batches, plan.passes_in_flight)
    )


def prefill_bound(
    plan: Plan, shape: ModelShape, profile: DeviceProfile, sequences: int, prompt: int
) -> Bound:
    """All prompts, in the fewest passes that the token budget allows.

    Attention and the logits of the prompts' last tokens are not counted.
    """
    tokens = sequences * prompt
    rounds = -(-tokens // (plan.token_budget * plan.passes_in_flight))
    a_round = tokens / rounds
    a_pass = a_round / plan.passes_in_flight
    micro_batches = min(plan.micro_batches, -(-int(a_pass) // plan.micro_batch_tokens))
    decode = Decode(round(a_round), 0, max(micro_batches, 1), plan.passes_in_flight)
    bound = _bound(plan, replace(shape, vocab_size=0), profile, decode)
    return Bound({name: seconds * rounds for name, seconds in bound.terms.items()})


def _bound(plan: Plan, shape: ModelShape, profile: DeviceProfile, decode: Decode) -> Bound:
    stages = plan.placement.num_stages
    terms = dict(predict(shape, [profile.shared_by(stages)] * stages, plan.placement, decode).terms)
    # One drive serves all stages here, so that it does not matter whose bytes it reads.
    read = sum(plan.nvme_bytes_a_pass) * decode.passes_in_flight
    return Bound(terms | {"nvme": read / (profile.nvme_gbps * GIGA)})
