"""What a round of passes is expected to take: the simulation of a placement on its machines."""

from collections.abc import Sequence

from headrace.scheduler.decode import Decode
from headrace.scheduler.experts import ExpertPools, loads_ahead
from headrace.scheduler.inputs import DeviceProfile, ModelShape
from headrace.scheduler.links import Links
from headrace.scheduler.memory import guest_pages
from headrace.scheduler.pages import pages_for
from headrace.scheduler.placement import Placement, Plan
from headrace.scheduler.simulate import simulate
from headrace.scheduler.timing import timing


def round_seconds(
    shape: ModelShape,
    profiles: Sequence[DeviceProfile],
    links: Links,
    placement: Placement,
    decode: Decode,
    *,
    ring_slots: Sequence[int],
    ahead: int,
    pools: ExpertPools | None,
) -> float:
    """Seconds in which every sequence of `decode` advances by one token."""
    times = timing(shape, profiles, placement, decode, ahead, pools, links)
    slots = ring_slots
    if pools is not None and any(experts.ahead for experts in times.experts.values()):
        slots = loads_ahead(shape, placement, pools, slots, decode.micro_batches)
    return simulate(
        placement,
        times,
        ring_slots=slots,
        micro_batches=decode.micro_batches,
        passes_in_flight=decode.passes_in_flight,
    )


def plan_seconds(
    plan: Plan,
    shape: ModelShape,
    profiles: Sequence[DeviceProfile],
    links: Links,
    sequences: int,
    context: int,
) -> float:
    """The same for a plan in which `sequences` of `context` tokens run. Where the plan has guests, those are
    guests that the device has no pages for."""
    prediction, passes = plan.prediction, plan.passes_in_flight
    guests = cold = sunk = 0
    if prediction.guests:
        own = plan.num_pages - guest_pages(prediction.guests)
        guests = max(0, sequences - own // pages_for(context))
        cold = plan.cold_micro_batches if guests else 0
        sunk = round(prediction.sunk_pages * guests / prediction.guests)
    batches = min(plan.micro_batches, -(-(sequences - guests) // passes)) + cold
    decode = Decode(sequences, context, batches, passes, guests, cold, sunk)
    pools = None
    if plan.expert_slots:
        pools = ExpertPools(plan.expert_slot_bytes, plan.expert_slots, plan.host_experts)
    return round_seconds(
        shape,
        profiles,
        links,
        plan.placement,
        decode,
        ring_slots=plan.ring_slots,
        ahead=plan.ahead,
        pools=pools,
    )
