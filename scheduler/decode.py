"""A decode pass in numbers: arithmetic, bytes in device memory, experts to load, hops."""

from dataclasses import dataclass
from itertools import pairwise

from headrace.scheduler.experts import ExpertPools, Loads, layer_loads, reached
from headrace.scheduler.inputs import DeviceProfile, ModelShape
from headrace.scheduler.links import Links
from headrace.scheduler.memory import Cache, Layout
from headrace.scheduler.placement import Placement
from headrace.scheduler.plan import PAGE_TOKENS

GIGA = 1e9
TERA = 1e12

FUSED_ROWS = 128
"""Rows of a micro-batch up to which a GPU multiplies 4-bit weights as they are stored."""


@dataclass(frozen=True, slots=True)
class Decode:
    """A steady decode: `sequences` over all passes, `rows` tokens in each micro-batch of a pass.

    `guests` of the sequences have their full pages in host RAM, or `sunk_pages` of them all on NVMe, and
    `cold_batches` of the micro-batches. `prompt_tokens` over all passes are computed beside.
    """

    sequences: int
    context: int
    micro_batches: int
    passes_in_flight: int
    guests: int = 0
    cold_batches: int = 0
    sunk_pages: int = 0
    prompt_tokens: int = 0

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
        tokens = self.sequences + self.prompt_tokens
        return tokens / self.passes_in_flight / self.micro_batches

    @property
    def decode_rows(self) -> float:
        """Those of them that each read all keys and values of a sequence."""
        return self.sequences / self.passes_in_flight / self.micro_batches


def layer_flops(shape: ModelShape, layer: int, rows: float) -> float:
    return 2.0 * shape.layer_active_parameters[layer] * rows


def prompt_attention_flops(shape: ModelShape, decode: Decode) -> float:
    """Of one micro-batch's prompts in one layer: on average a token looks at half a context, and its queries
    are multiplied with as many keys, and as many values are summed."""
    width = max(shape.hidden_size, shape.attention_size)
    return 2.0 * width * decode.context * (decode.rows - decode.decode_rows)


def layer_traffic(shape: ModelShape, layer: int, decode: Decode) -> float:
    """Bytes that one micro-batch cannot but move in device memory for one layer.

    Stored weights are read: of a mixture's experts, those that the rows reach. Then the keys and
    values of every row.
    """
    return weight_traffic(shape, layer, decode) + kv_traffic(shape, layer, decode)


def weight_traffic(shape: ModelShape, layer: int, decode: Decode) -> float:
    parameters = shape.layer_parameters[layer]
    share = hit_parameters(shape, layer, decode.rows) / parameters if parameters else 1.0
    return shape.layer_bytes[layer] * share


def kv_traffic(shape: ModelShape, layer: int, decode: Decode) -> float:
    return decode.decode_rows * decode.context / PAGE_TOKENS * shape.layer_kv_bytes[layer]


def layer_seconds(shape: ModelShape, layer: int, decode: Decode, profile: DeviceProfile) -> float:
    """One micro-batch's computing of one layer.

    Weights that are multiplied as they are stored are read while they are; dequantizing and
    multiplying take turns, and decoding 4-bit weights keeps the processor from it, so that their times
    add up.
    """
    flops = layer_flops(shape, layer, _computed_rows(shape, decode, profile))
    flops += prompt_attention_flops(shape, decode)
    flops /= profile.tflops * TERA
    weights = weight_traffic(shape, layer, decode) / (profile.hbm_gbps * GIGA)
    rest = kv_traffic(shape, layer, decode) + dequantized(shape, layer, decode, profile)
    multiplying = flops + weights if shape.needs_scratch else max(flops, weights)
    return multiplying + rest / (profile.hbm_gbps * GIGA) + profile.layer_seconds


def head_seconds(shape: ModelShape, decode: Decode, profile: DeviceProfile) -> float:
    """One micro-batch's computing of logits."""
    flops = head_flops(shape, _computed_rows(shape, decode, profile))
    return flops / (profile.tflops * TERA) + shape.head_bytes / (profile.hbm_gbps * GIGA)


def _computed_rows(shape: ModelShape, decode: Decode, profile: DeviceProfile) -> float:
    """Rows of a micro-batch's products, with padding."""
    return max(decode.rows, profile.least_rows) if shape.compute_bytes == 4 else decode.rows


def dequantized(shape: ModelShape, layer: int, decode: Decode, profile: DeviceProfile) -> float:
    """Bytes that one micro-batch moves besides for one layer, where what is stored in few bits is
    written in the compute type and read again."""
    four_bit = 4 * shape.layer_bytes[layer] < 3 * shape.layer_parameters[layer]
    in_registers = four_bit and profile.kind == "cuda" and decode.rows <= FUSED_ROWS
    if in_registers or not shape.needs_scratch:
        return 0.0
    return 2.0 * hit_parameters(shape, layer, decode.rows) * shape.compute_bytes


def hit_parameters(shape: ModelShape, layer: int, rows: float) -> float:
    """Matrix elements that `rows` tokens use: where experts cannot be told apart, at most these."""
    parameters, active = shape.layer_parameters[layer], shape.layer_active_parameters[layer]
    experts = shape.experts_of(layer)
    if experts is None or experts.per_token >= experts.count:
        return min(float(parameters), active * rows)
    routed = (parameters - active) / (1.0 - experts.per_token / experts.count)
    return parameters - routed + routed * reached(experts, rows) / experts.count


def hop_times(
    shape: ModelShape, links: Links, placement: Placement, rows: float
) -> tuple[tuple[float, float], ...]:
    """Latency and transfer time of one micro-batch's hidden states on their way to each visit.

    Nothing where they are there already. The first one's is the way back of what was drawn: a few
    bytes, so only latency.
    """
    size = rows * shape.hidden_size * shape.compute_bytes / GIGA
    last, first = placement.last_stage, placement.first_stage
    hops = [(links.between(last, first).seconds if placement.num_stages > 1 else 0.0, 0.0)]
    for a, b in pairwise(placement.visits):
        hop = links.between(a.stage, b.stage)
        hops.append((0.0, 0.0) if a.stage == b.stage else (hop.seconds, size / hop.gbps))
    return tuple(hops)


def expert_loads(
    shape: ModelShape, placement: Placement, decode: Decode, pools: ExpertPools | None
) -> dict[int, Loads]:
    if pools is None:
        return {}
    return layer_loads(shape, placement, pools, decode.micro_batches, decode.rows)


def head_flops(shape: ModelShape, rows: float) -> float:
    return 2.0 * shape.hidden_size * shape.vocab_size * rows
