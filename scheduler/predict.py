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
from dataclasses import dataclass

from headrace.scheduler.experts import ExpertPools, Loads, layer_loads, reached
from headrace.scheduler.inputs import DeviceProfile, ModelShape
from headrace.scheduler.memory import Cache, Layout, slot_bytes, window_slot_bytes
from headrace.scheduler.placement import ExpertTraffic, Placement, Prediction, Tier
from headrace.scheduler.plan import PAGE_TOKENS
from headrace.scheduler.simulate import ExpertTimes, Timing

GIGA = 1e9
TERA = 1e12

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

FUSED_ROWS = 128
"""Rows of a micro-batch up to which a GPU multiplies 4-bit weights as they are stored."""

AHEAD_BELOW = 1.0
"""Seconds of a pass. In longer ones the turn is lost among the loads, and a new request would wait
for a second one to end."""


@dataclass(frozen=True, slots=True)
class Decode:
    """A steady decode: `sequences` over all passes, `rows` tokens in each micro-batch of a pass.

    `guests` of the sequences have their full pages in host RAM, or `sunk_pages` of them all on NVMe, and
    `cold_batches` of the micro-batches.
    """

    sequences: int
    context: int
    micro_batches: int
    passes_in_flight: int
    guests: int = 0
    cold_batches: int = 0
    sunk_pages: int = 0

    @classmethod
    def of(cls, layout: Layout, cache: Cache, context: int) -> "Decode":
        a_pass = -(-cache.sequences // layout.passes_in_flight)
        batches = min(layout.micro_batches, a_pass) + cache.cold_batches
        passes, guests, cold = layout.passes_in_flight, cache.guests, cache.cold_batches
        return cls(cache.in_all, context, batches, passes, guests, cold, cache.sunk)

    @property
    def cold_pages(self) -> int:
        """Pages that all passes together bring from host RAM and NVMe: all but the newest."""
        return self.guests * (max(0, self.context - 1) // PAGE_TOKENS)

    @property
    def rows(self) -> float:
        return self.sequences / self.passes_in_flight / self.micro_batches


def _flops(shape: ModelShape, layer: int, rows: float) -> float:
    return 2.0 * shape.layer_active_parameters[layer] * rows


def _traffic(shape: ModelShape, layer: int, decode: Decode) -> float:
    """Bytes that one micro-batch cannot but move in device memory for one layer.

    Stored weights are read: of a mixture's experts, those that the rows reach. Then the keys and
    values of every row.
    """
    parameters = shape.layer_parameters[layer]
    share = _hit_parameters(shape, layer, decode.rows) / parameters if parameters else 1.0
    kv = decode.rows * decode.context / PAGE_TOKENS * shape.layer_kv_bytes[layer]
    return shape.layer_bytes[layer] * share + kv


def _dequantized(shape: ModelShape, layer: int, decode: Decode, profile: DeviceProfile) -> float:
    """Bytes that one micro-batch moves besides for one layer, where what is stored in few bits is
    written in the compute type and read again."""
    four_bit = 4 * shape.layer_bytes[layer] < 3 * shape.layer_parameters[layer]
    in_registers = four_bit and profile.kind == "cuda" and decode.rows <= FUSED_ROWS
    if in_registers or not shape.needs_scratch:
        return 0.0
    return 2.0 * _hit_parameters(shape, layer, decode.rows) * shape.compute_bytes


def _hit_parameters(shape: ModelShape, layer: int, rows: float) -> float:
    """Matrix elements that `rows` tokens use: where experts cannot be told apart, at most these."""
    parameters, active = shape.layer_parameters[layer], shape.layer_active_parameters[layer]
    experts = shape.experts_of(layer)
    if experts is None or experts.per_token >= experts.count:
        return min(float(parameters), active * rows)
    routed = (parameters - active) / (1.0 - experts.per_token / experts.count)
    return parameters - routed + routed * reached(experts, rows) / experts.count


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


def _hop_seconds(
    shape: ModelShape, profiles: Sequence[DeviceProfile], rows: float
) -> tuple[float, float]:
    """Latency and transfer time of one micro-batch's hidden states over the slowest edge."""
    size = rows * shape.hidden_size * shape.compute_bytes / GIGA
    return max(p.hop_seconds for p in profiles), size / min(p.link_gbps for p in profiles)


def _loads(
    shape: ModelShape, placement: Placement, decode: Decode, pools: ExpertPools | None
) -> dict[int, Loads]:
    if pools is None:
        return {}
    return layer_loads(shape, placement, pools, decode.micro_batches, decode.rows)


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
) -> Timing:
    """What `simulate` needs. Dequantizing and matmuls alternate, so their times add up."""
    load = [0.0] * shape.num_layers
    compute = [0.0] * shape.num_layers
    held = shape.held_bytes(split=pools is not None)
    loads = _loads(shape, placement, decode, pools)
    experts: dict[int, ExpertTimes] = {}
    for visit in placement.visits:
        profile = profiles[visit.stage]
        for layer in visit.layers:
            load[layer] = _load_seconds(profile, placement.tiers[layer], held[layer])
            if layer in loads:
                experts[layer] = _expert_times(profile, loads[layer])
            compute[layer] = _flops(shape, layer, decode.rows) / (profile.tflops * TERA)
            moved = _traffic(shape, layer, decode) + _dequantized(shape, layer, decode, profile)
            compute[layer] += moved / (profile.hbm_gbps * GIGA)
    last = profiles[placement.last_stage]
    compute[-1] += _head_flops(shape, decode.rows) / (last.tflops * TERA)
    compute[-1] += shape.head_bytes / (last.hbm_gbps * GIGA)
    hop = sum(_hop_seconds(shape, profiles, decode.rows))
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
    turn, batches = turnaround(placement, ahead), decode.cold_batches
    return Timing(
        tuple(load), tuple(compute), hop, turn, experts, tuple(cold), batches, tuple(sunk)
    )


def _head_flops(shape: ModelShape, rows: float) -> float:
    return 2.0 * shape.hidden_size * shape.vocab_size * rows


def predict(
    shape: ModelShape,
    profiles: Sequence[DeviceProfile],
    placement: Placement,
    decode: Decode,
    pools: ExpertPools | None = None,
) -> Prediction:
    """Seconds in which all `decode.sequences` sequences advance by one token, and why.

    With `pools`, layers are split and these are the slots for their experts.
    """
    rounds = decode.passes_in_flight
    # Fewer micro-batches under way than stages leave stages without work.
    under_way = decode.micro_batches * rounds
    idle = max(1.0, placement.num_stages / under_way)
    terms = dict.fromkeys(("nvme", "pcie", "compute", "hbm"), 0.0)
    held = shape.held_bytes(split=pools is not None)
    loads = _loads(shape, placement, decode, pools)
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
    terms["hops"] = _hops(shape, profiles, placement, decode)
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
    flops = sum(_flops(shape, layer, decode.rows) for layer in layers)
    traffic = sum(_traffic(shape, layer, decode) for layer in layers)
    traffic += _cold_bytes(shape, placement, decode, stage) / decode.micro_batches  # to the ring
    if stage == placement.last_stage:
        flops += _head_flops(shape, decode.rows)
        traffic += shape.head_bytes
    return {
        "compute": decode.micro_batches * flops / (profile.tflops * TERA),
        "hbm": decode.micro_batches * traffic / (profile.hbm_gbps * GIGA),
    }


def _hops(
    shape: ModelShape, profiles: Sequence[DeviceProfile], placement: Placement, decode: Decode
) -> float:
    """The way of one micro-batch round the ring, or all that one stage sends, if that is longer."""
    pairs = zip(placement.visits, placement.visits[1:], strict=False)
    leaving = [a.stage for a, b in pairs if a.stage != b.stage]
    if not leaving:
        return 0.0
    latency, transfer = _hop_seconds(shape, profiles, decode.rows)
    busiest = max(leaving.count(stage) for stage in range(placement.num_stages))
    sending = busiest * decode.micro_batches * decode.passes_in_flight * transfer
    return max(len(leaving) * (latency + transfer), sending)
