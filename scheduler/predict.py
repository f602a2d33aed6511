"""How long a decode pass takes, by the formula of the design:

    T = max( (nvme + sunk KV bytes) / drive GB/s, (nvme + host + KV bytes) / link GB/s, compute, HBM, hops )

KV bytes are the full pages of sequences that have them in host RAM or on NVMe, once for each token; sunk
ones are those on NVMe.

The slowest stage decides every term. With one convoy (one pass in flight) each stage loads its
layers once for all sequences. With a group in flight per stage, each group has the layers loaded
again, so a round of `passes_in_flight` passes costs that many times one pass. Experts of split
layers are loaded as far as tokens reach them and they are not at hand (headrace.scheduler.experts),
by no more stages at a time than micro-batches are under way, unless they are loaded ahead.
"""

from collections.abc import Iterable, Mapping, Sequence

from headrace.scheduler.decode import (
    GIGA,
    TERA,
    Decode,
    expert_loads,
    head_flops,
    hop_times,
    layer_flops,
    layer_traffic,
)
from headrace.scheduler.experts import ExpertPools, Loads
from headrace.scheduler.inputs import DeviceProfile, ModelShape
from headrace.scheduler.links import Links
from headrace.scheduler.memory import window_slot_bytes
from headrace.scheduler.placement import ExpertTraffic, Placement, Prediction, Tier


def predict(
    shape: ModelShape,
    profiles: Sequence[DeviceProfile],
    placement: Placement,
    decode: Decode,
    pools: ExpertPools | None = None,
    links: Links | None = None,
) -> Prediction:
    """Seconds in which all `decode.sequences` sequences advance by one token, and why.

    With `pools`, layers are split and these are the slots for their experts. Stages reach each other
    as `links` say, or as their profiles do.
    """
    loads = expert_loads(shape, placement, decode, pools)
    held = shape.held_bytes(split=pools is not None)
    terms, without_kv = _stage_terms(shape, profiles, placement, decode, held, loads)
    terms["hops"] = _hops(shape, links or Links.of(profiles), placement, decode)
    bound_by = max(terms, key=lambda name: terms[name])
    seconds = terms[bound_by]
    rate = decode.sequences / seconds
    traffic = None if pools is None else _traffic_of(loads.values())
    return Prediction(
        decode.sequences,
        seconds,
        rate,
        bound_by,
        terms,
        traffic,
        guests=decode.guests,
        cold_pages=decode.cold_pages,
        cold_seconds=terms["pcie"] - without_kv["pcie"],
        sunk_pages=decode.sunk_pages,
        sunk_seconds=terms["nvme"] - without_kv["nvme"],
        sunk_bytes=decode.sunk_pages * window_slot_bytes(shape.layer_kv_bytes),
    )


def _stage_terms(
    shape: ModelShape,
    profiles: Sequence[DeviceProfile],
    placement: Placement,
    decode: Decode,
    held: Sequence[int],
    loads: Mapping[int, Loads],
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the slowest stage for each term, and what drive and link need without KV pages."""
    rounds = decode.passes_in_flight
    # Fewer micro-batches under way than stages leave stages without work.
    under_way = decode.micro_batches * rounds
    idle = max(1.0, placement.num_stages / under_way)
    terms = dict.fromkeys(("nvme", "pcie", "compute", "hbm"), 0.0)
    without_kv = dict.fromkeys(("nvme", "pcie"), 0.0)
    for stage, profile in enumerate(profiles):
        found = _moving(profile, placement, held, loads, stage, idle)
        for name in without_kv:
            without_kv[name] = max(without_kv[name], rounds * found[name])
        found["nvme"] += _sunk_seconds(shape, profile, placement, decode, stage)
        found["pcie"] += _cold_seconds(shape, profile, placement, decode, stage)
        found |= _computing(shape, profile, placement, decode, stage)
        for name, seconds in found.items():
            waits = rounds * (idle if name in ("compute", "hbm") else 1.0)
            terms[name] = max(terms[name], seconds * waits)
    return terms, without_kv


def _cold_bytes(shape: ModelShape, placement: Placement, decode: Decode, stage: int) -> float:
    """Of the pages that one pass brings to one stage."""
    page = sum(shape.layer_kv_bytes[layer] for layer in placement.layers_of(stage))
    return decode.cold_pages * page / decode.passes_in_flight


def _cold_seconds(
    shape: ModelShape, profile: DeviceProfile, placement: Placement, decode: Decode, stage: int
) -> float:
    return _cold_bytes(shape, placement, decode, stage) / (profile.host_gbps * GIGA)


def _sunk_seconds(
    shape: ModelShape, profile: DeviceProfile, placement: Placement, decode: Decode, stage: int
) -> float:
    """Of one stage's drive in one pass: parts of pages are read in whole blocks."""
    page = window_slot_bytes(shape.layer_kv_bytes[i] for i in placement.layers_of(stage))
    return decode.sunk_pages * page / decode.passes_in_flight / (profile.nvme_gbps * GIGA)


def _traffic_of(loads: Iterable[Loads]) -> ExpertTraffic:
    every = list(loads)
    return ExpertTraffic(
        reached=sum(one.reached for one in every),
        loaded=sum(one.loaded for one in every),
        nvme_bytes=sum(one.nvme_bytes for one in every),
        host_bytes=sum(one.host_bytes for one in every),
    )


def _moving(
    profile: DeviceProfile,
    placement: Placement,
    held: Sequence[int],
    loads: Mapping[int, Loads],
    stage: int,
    idle: float,
) -> dict[str, float]:
    """Seconds of one pass on one stage, for its drive and for its link.

    Loads that wait for tokens take `idle` times as long as seen from the whole ring.
    """
    layers = placement.layers_of(stage)
    own = [loads[layer] for layer in layers if layer in loads]
    nvme, host = (
        float(sum(held[i] for i in layers if placement.tiers[i] is tier))
        for tier in (Tier.NVME, Tier.HOST)
    )
    nvme += sum(one.nvme_bytes * (one.ahead + idle * (1.0 - one.ahead)) for one in own)
    host += sum(one.host_bytes * (one.ahead + idle * (1.0 - one.ahead)) for one in own)
    crossing = nvme + host if profile.kind == "cuda" else host
    return {
        "nvme": nvme / (profile.nvme_gbps * GIGA),
        "pcie": crossing / (profile.host_gbps * GIGA),
    }


def _computing(
    shape: ModelShape, profile: DeviceProfile, placement: Placement, decode: Decode, stage: int
) -> dict[str, float]:
    """Seconds of one pass on one stage, for arithmetic and for device memory."""
    layers = placement.layers_of(stage)
    flops = sum(layer_flops(shape, layer, decode.rows) for layer in layers)
    traffic = sum(layer_traffic(shape, layer, decode) for layer in layers)
    traffic += _cold_bytes(shape, placement, decode, stage) / decode.micro_batches  # to the ring
    if stage == placement.last_stage:
        flops += head_flops(shape, decode.rows)
        traffic += shape.head_bytes
    return {
        "compute": decode.micro_batches * flops / (profile.tflops * TERA),
        "hbm": decode.micro_batches * traffic / (profile.hbm_gbps * GIGA),
    }


def _hops(shape: ModelShape, links: Links, placement: Placement, decode: Decode) -> float:
    """The way of one micro-batch round the ring, or all that one stage sends, if that is longer."""
    hops = hop_times(shape, links, placement, decode.rows)[1:]
    sending = [0.0] * placement.num_stages
    for visit, (_, transfer) in zip(placement.visits, hops, strict=False):
        sending[visit.stage] += transfer * decode.micro_batches * decode.passes_in_flight
    return max(sum(latency + transfer for latency, transfer in hops), *sending)
