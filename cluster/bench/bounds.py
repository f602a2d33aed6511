"""What a run cannot be faster than, by the planner's formula and speeds measured beside the run.

Which experts of split layers had to be loaded is taken from the run itself: how tokens were routed
and what was at hand is no speed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.cluster.bench.needed import Bytes, layer_bytes
from headrace.scheduler.decode import Decode
from headrace.scheduler.inputs import DeviceProfile, ModelShape
from headrace.scheduler.placement import Plan
from headrace.scheduler.predict import predict

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
    plan: Plan,
    shape: ModelShape,
    profile: DeviceProfile,
    sequences: int,
    context: int,
    experts: Sequence[Bytes] = (),
    cold: Sequence[Bytes] = (),
) -> Bound:
    """A round in which `sequences` of `context` tokens advance by one; each stage has to load
    `experts` in it, and `cold` KV pages."""
    a_pass = -(-sequences // plan.passes_in_flight)
    micro_batches = min(plan.micro_batches, a_pass)
    decode = Decode(sequences, context, micro_batches, plan.passes_in_flight)
    return _bound(plan, shape, profile, decode, 1, experts, cold)


def prefill_bound(
    plan: Plan,
    shape: ModelShape,
    profile: DeviceProfile,
    sequences: int,
    prompt: int,
    experts: Sequence[Bytes] = (),
) -> Bound:
    """All prompts, in the fewest passes that the token budget allows; each stage has to load
    `experts` in them all.

    Attention and the logits of the prompts' last tokens are not counted.
    """
    tokens = sequences * prompt
    rounds = -(-tokens // (plan.token_budget * plan.passes_in_flight))
    a_round = tokens / rounds
    a_pass = a_round / plan.passes_in_flight
    micro_batches = min(plan.micro_batches, -(-int(a_pass) // plan.micro_batch_tokens))
    decode = Decode(round(a_round), 0, max(micro_batches, 1), plan.passes_in_flight)
    return _bound(plan, replace(shape, vocab_size=0), profile, decode, rounds, experts)


def _bound(
    plan: Plan,
    shape: ModelShape,
    profile: DeviceProfile,
    decode: Decode,
    rounds: int,
    experts: Sequence[Bytes],
    cold: Sequence[Bytes] = (),
) -> Bound:
    stages = plan.placement.num_stages
    shared = profile.shared_by(stages)
    terms = predict(shape, [shared] * stages, plan.placement, decode).terms
    layers = layer_bytes(plan, rounds * decode.passes_in_flight)
    # One drive serves all stages here, so that it does not matter whose bytes it reads.
    read = sum(part.nvme for part in (*layers, *experts, *cold))
    nothing = (Bytes(0, 0),) * stages
    whole = zip(layers, experts or nothing, cold or nothing, strict=True)
    crossing = max(sum(_crossing(part, profile) for part in parts) for parts in whole)
    return Bound(
        {name: seconds * rounds for name, seconds in terms.items()}
        | {
            "nvme": read / (profile.nvme_gbps * GIGA),
            "pcie": crossing / (shared.host_gbps * GIGA),
        }
    )


def _crossing(part: Bytes, profile: DeviceProfile) -> float:
    """Bytes that are copied from host RAM: a drive writes straight into a CPU's ring."""
    return part.both if profile.kind == "cuda" else part.host
