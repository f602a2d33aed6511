"""How long the parts of a decode pass take, for `simulate`."""

from collections.abc import Sequence

from headrace.scheduler.decode import (
    GIGA,
    Decode,
    expert_loads,
    head_seconds,
    hop_times,
    layer_seconds,
)
from headrace.scheduler.experts import ExpertPools, Loads
from headrace.scheduler.inputs import DeviceProfile, ModelShape
from headrace.scheduler.links import Links
from headrace.scheduler.memory import slot_bytes
from headrace.scheduler.placement import Placement, Prediction, Tier
from headrace.scheduler.simulate import ExpertTimes, Timing

TURNAROUND = 0.008
"""Seconds between a pass's last layer and the next one's first, measured on an H200 with 256
sequences: the driver commits, schedules, encodes and calls. A ring with slots to spare loads through
them."""

TURNAROUND_AHEAD = 0.0013
"""The same for a pass that waits at the stage already, made ready but for its tokens: passes of 128
sequences took 9.0 ms on an H200 and kept it busy for 7.8."""

TURNAROUND_BETWEEN = 0.005
"""The same where another stage embeds, to which Ray takes the answer; from a trace of two H200s with 256
sequences, when passes were not made ready yet."""

AHEAD_BELOW = 1.0
"""Seconds of a pass. In longer ones the turn is lost among the loads, and a new request would wait
for a second one to end."""


def _load_seconds(profile: DeviceProfile, tier: Tier, nbytes: float) -> float:
    size = nbytes / GIGA
    if tier is Tier.DEVICE:
        return 0.0
    if tier is Tier.HOST:
        return size / profile.host_gbps
    # A drive writes straight into a CPU's ring; on its way to a GPU it crosses the link as it goes.
    crossing = size / profile.host_gbps if profile.kind == "cuda" else 0.0
    return max(size / profile.nvme_gbps, crossing)


def _expert_times(profile: DeviceProfile, loads: Loads) -> ExpertTimes:
    return ExpertTimes(
        nvme=_load_seconds(profile, Tier.NVME, loads.nvme_bytes),
        host=_load_seconds(profile, Tier.HOST, loads.host_bytes),
        ahead=loads.ahead,
    )


def passes_ahead(prediction: Prediction) -> int:
    """Passes to submit before the tokens that they continue are known."""
    return 1 if prediction.pass_seconds < AHEAD_BELOW else 0


def turnaround(placement: Placement, ahead: int) -> float:
    """Seconds between a pass's last layer and the first one of the pass that needs its tokens."""
    if not ahead:
        return TURNAROUND
    same = placement.first_stage == placement.last_stage
    return TURNAROUND_AHEAD if same else TURNAROUND_BETWEEN


def timing(
    shape: ModelShape,
    profiles: Sequence[DeviceProfile],
    placement: Placement,
    decode: Decode,
    ahead: int,
    pools: ExpertPools | None = None,
    links: Links | None = None,
) -> Timing:
    """What `simulate` needs."""
    load = [0.0] * shape.num_layers
    compute = [0.0] * shape.num_layers
    held = shape.held_bytes(split=pools is not None)
    loads = expert_loads(shape, placement, decode, pools)
    experts: dict[int, ExpertTimes] = {}
    for visit in placement.visits:
        profile = profiles[visit.stage]
        for layer in visit.layers:
            load[layer] = _load_seconds(profile, placement.tiers[layer], held[layer])
            if layer in loads:
                experts[layer] = _expert_times(profile, loads[layer])
            compute[layer] = layer_seconds(shape, layer, decode, profile)
    last = profiles[placement.last_stage]
    compute[-1] += head_seconds(shape, decode, last)
    hops = hop_times(shape, links or Links.of(profiles), placement, decode.rows)
    cold, sunk = _cold_seconds(shape, profiles, placement, decode)
    turn, batches = turnaround(placement, ahead), decode.cold_batches
    return Timing(tuple(load), tuple(compute), 0.0, turn, experts, cold, batches, sunk, hops)


def _cold_seconds(
    shape: ModelShape, profiles: Sequence[DeviceProfile], placement: Placement, decode: Decode
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of the link and of the drive, for the pages that one micro-batch brings for each layer."""
    cold = [0.0] * shape.num_layers
    sunk = [0.0] * shape.num_layers
    if decode.cold_batches:
        uses = decode.passes_in_flight * decode.cold_batches
        for visit in placement.visits:
            profile = profiles[visit.stage]
            for layer in visit.layers:
                nbytes = shape.layer_kv_bytes[layer]
                cold[layer] = decode.cold_pages / uses * nbytes / (profile.host_gbps * GIGA)
                read = decode.sunk_pages / uses * slot_bytes(nbytes)
                sunk[layer] = read / (profile.nvme_gbps * GIGA)
    return tuple(cold), tuple(sunk)
