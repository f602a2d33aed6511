"""Placement is data: which stage visits which layers, in what order, and where their bytes live."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate, pairwise

from headrace.scheduler.config import DraftLimits, KVCosts


class Tier(str, Enum):
    """Where a layer's weights rest between visits."""

    DEVICE = "device"
    HOST = "host"
    NVME = "nvme"


@dataclass(frozen=True, slots=True)
class Visit:
    """Consecutive layers that one stage computes while every micro-batch of a pass goes by."""

    stage: int
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Visits in ring order; their layers are 0, 1, ..., num_layers - 1. `tiers` has one entry a layer.

    The stage of the first visit embeds tokens, the stage of the last one holds the head and samples.
    """

    num_stages: int
    visits: tuple[Visit, ...]
    tiers: tuple[Tier, ...]

    def __post_init__(self) -> None:
        order = [layer for visit in self.visits for layer in visit.layers]
        assert order == list(range(len(self.tiers))), order
        assert {visit.stage for visit in self.visits} == set(range(self.num_stages))

    @property
    def num_layers(self) -> int:
        return len(self.tiers)

    @property
    def first_stage(self) -> int:
        return self.visits[0].stage

    @property
    def last_stage(self) -> int:
        return self.visits[-1].stage

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """The (from, to) pairs of stages between which hidden states travel, in ring order."""
        pairs = zip(self.visits, self.visits[1:], strict=False)
        return tuple(dict.fromkeys((a.stage, b.stage) for a, b in pairs if a.stage != b.stage))

    def visits_of(self, stage: int) -> tuple[int, ...]:
        """Indices into `visits`, in ring order."""
        return tuple(i for i, visit in enumerate(self.visits) if visit.stage == stage)

    def layers_of(self, stage: int) -> tuple[int, ...]:
        return tuple(
            layer for visit in self.visits if visit.stage == stage for layer in visit.layers
        )

    def streamed(self, stage: int) -> tuple[int, ...]:
        """The stage's layers that a pass has to load, in the order it needs them."""
        return tuple(i for i in self.layers_of(stage) if self.tiers[i] is not Tier.DEVICE)


def contiguous_visits(num_layers: int, num_stages: int, layers_a_visit: int) -> tuple[Visit, ...]:
    """Stage s takes the s-th block of layers, cut into visits of at most `layers_a_visit` layers."""
    starts = [num_layers * stage // num_stages for stage in range(num_stages + 1)]
    return contiguous_blocks([b - a for a, b in pairwise(starts)], layers_a_visit)


def contiguous_blocks(layers: Sequence[int], layers_a_visit: int) -> tuple[Visit, ...]:
    """The same where stage s takes layers[s] layers."""
    starts = list(accumulate(layers, initial=0))
    return tuple(
        Visit(stage, tuple(range(first, min(first + layers_a_visit, starts[stage + 1]))))
        for stage in range(len(layers))
        for first in range(starts[stage], starts[stage + 1], layers_a_visit)
    )


def cyclic_visits(num_layers: int, num_stages: int, layers_a_visit: int) -> tuple[Visit, ...]:
    """Visit v goes to stage v mod N, so that every stage loads for the same convoy of sequences."""
    starts = range(0, num_layers, layers_a_visit)
    return tuple(
        Visit(v % num_stages, tuple(range(first, min(first + layers_a_visit, num_layers))))
        for v, first in enumerate(starts)
    )


def cyclic_turns(turns: Sequence[int], num_layers: int, layers_a_visit: int) -> tuple[Visit, ...]:
    """Visits of which stage s has turns[s], spread evenly over the cycle. The last is on the stage that it
    is on with equal turns.

    Smooth weighted round-robin, as nginx chooses servers: whoever is most behind its share is next.
    """
    total, behind, order = sum(turns), [0] * len(turns), []
    for _ in range(total):
        behind = [owed + turn for owed, turn in zip(behind, turns, strict=True)]
        stage = behind.index(max(behind))
        behind[stage] -= total
        order.append(stage)
    rest = order.index((total - 1) % len(turns)) + 1
    order = order[rest:] + order[:rest]
    starts = range(0, num_layers, layers_a_visit)
    return tuple(
        Visit(stage, tuple(range(first, min(first + layers_a_visit, num_layers))))
        for stage, first in zip(order, starts, strict=True)
    )


def is_even(visits: Sequence[Visit], num_stages: int) -> bool:
    """Whether every stage has as many layers as the others, as near as that can be."""
    if all(visit.stage == i % num_stages for i, visit in enumerate(visits)):
        return True
    layers = [0] * num_stages
    for visit in visits:
        layers[visit.stage] += len(visit.layers)
    return max(layers) - min(layers) <= 1


def spread(num_layers: int, num_resident: int) -> tuple[bool, ...]:
    """Which of a stage's layers stay resident: evenly spaced, so that their compute hides loads."""
    return tuple(
        (i + 1) * num_resident // num_layers > i * num_resident // num_layers
        for i in range(num_layers)
    )


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What one stage allocates, in bytes. `device` parts fit --device-memory, `host` parts --host-memory.

    resident: layers kept on the device.  ring: slots x slot bytes.  head: final norm and LM head.
    kv: pages of this stage's layers.  kv_ring: slots for pages that pass through, of the layer with the largest.  tails: newest pages, where full ones are quantized.  scratch: one dequantized matrix.  activations: one micro-batch.
    adapters: slots of adapters on the device.  experts: slots of experts on the device.  graphs: CUDA graphs.  host_layers: pinned layers.  host_experts: pinned
    experts.  host_kv: host slots for pages.  host_window: pages that pass through from NVMe.  host_log: pages on their way to NVMe.  host_adapters: adapters.  embed: the embedding table, kept in host RAM and outside the budget, like `process`:
    interpreter, libraries and reader buffers.
    """

    resident: int
    ring: int
    head: int
    kv: int
    scratch: int
    activations: int
    host_layers: int
    embed: int
    process: int
    experts: int = 0
    host_experts: int = 0
    graphs: int = 0
    tails: int = 0
    host_kv: int = 0
    host_log: int = 0
    kv_ring: int = 0
    host_window: int = 0
    adapters: int = 0
    host_adapters: int = 0

    @property
    def device(self) -> int:
        weights = self.resident + self.ring + self.experts + self.head
        return (
            weights
            + self.kv
            + self.kv_ring
            + self.tails
            + self.scratch
            + self.activations
            + self.graphs
            + self.adapters
        )

    @property
    def host(self) -> int:
        return (
            self.host_layers
            + self.host_experts
            + self.host_kv
            + self.host_window
            + self.host_log
            + self.host_adapters
        )


@dataclass(frozen=True, slots=True)
class ExpertTraffic:
    """Routed experts of split layers in a pass over all stages, as expected of even routing.

    `reached` by its tokens, each once a layer; `loaded` of them, because they were not on the
    device; and where the bytes of those come from.
    """

    reached: float
    loaded: float
    nvme_bytes: float
    host_bytes: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """One decode pass of `sequences` sequences, by the formula of the design.

    `terms` maps each physical bound ("nvme", "pcie", "compute", "hbm", "hops") to its seconds; the
    largest binds. tokens/s = sequences / pass_seconds. `experts` is None where no layer is split.
    `guests` of the sequences have their full pages in host RAM or on NVMe, which adds `cold_seconds` to
    "pcie" for `cold_pages` that are brought to every stage, and `sunk_seconds` to "nvme" for those
    `sunk_pages` of them that have no room in host RAM, of `sunk_bytes` over all stages.
    `expected_seconds` is what the simulation of the plan takes where the formula says what it takes
    at least; 0 where none was made. `prompt_seconds` is the same for passes that prompts fill, of which
    they have `prompt_tokens` over all passes in flight; 0 where nothing streams.
    """

    sequences: int
    pass_seconds: float
    tokens_per_second: float
    bound_by: str
    terms: dict[str, float]
    experts: ExpertTraffic | None = None
    guests: int = 0
    cold_pages: int = 0
    cold_seconds: float = 0.0
    sunk_pages: int = 0
    sunk_seconds: float = 0.0
    sunk_bytes: float = 0.0
    expected_seconds: float = 0.0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0

    @property
    def share(self) -> float:
        """Of the bound that is expected to be reached."""
        return self.pass_seconds / self.expected_seconds if self.expected_seconds else 1.0

    @property
    def expected_rate(self) -> float:
        """Tokens a second by the simulation."""
        return self.sequences / (self.expected_seconds or self.pass_seconds)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is settled before a run. A run fails rather than deviate from it.

    `ring_slots[stage]` slots of `slot_bytes` each; `num_pages` KV pages in `kv_format` with the same
    ids on every stage, and `num_tails` in the compute type for requests' newest ones (0 where pages
    are not quantized: there is no need), and `host_pages` slots in each stage's host RAM, with the same
    ids, for full pages that have to leave the device, and room for `nvme_pages` of them on each stage's
    drive, at `kv_costs`; decodes carry `drafts`; at most `token_budget` tokens and `max_sequences` requests a pass, in at most
    `micro_batches` micro-batches of at most `micro_batch_tokens` tokens; logits of `logit_rows` rows
    at a time, sampled `sample_rows` at a time; `passes_in_flight` passes, and `ahead` (0 or 1) that
    are submitted before the tokens of the pass they follow are known. Micro-batches of at most
    `graph_rows` decodes are replayed as CUDA graphs, from at most `graph_lanes` lanes.

    Requests whose pages lie in host slots go on decoding in up to `cold_micro_batches` more micro-batches
    of at most as many tokens, each of which may need up to `kv_ring_pages` pages: for so many, two slots
    of each stage's KV ring have room in turn. Those of their pages that are older than `hot_window`
    tokens may lie in `window_pages` slots on each stage's drive, with the same ids, from `host_pages` on.

    Where `expert_slots[stage]` is not 0, the stage's layers whose experts can be read alone are
    split, whatever their tier: what every token needs of them rests in the tier (on the device, too)
    and passes through the ring if it rests elsewhere; each routed expert is loaded when tokens reach
    it, into one of that many slots of `expert_slot_bytes` on the device. `host_experts[stage]`
    experts can be kept in host RAM. The bytes a pass are then those without experts.

    `adapter_slots` adapters of ranks up to `adapter_rank` are on each stage's device at once, in slots with the
    same numbers.
    """

    placement: Placement
    slot_bytes: int
    ring_slots: tuple[int, ...]
    num_pages: int
    kv_format: str
    max_context: int
    token_budget: int
    max_sequences: int
    micro_batches: int
    micro_batch_tokens: int
    logit_rows: int
    sample_rows: int
    graph_rows: int
    passes_in_flight: int
    ahead: int
    memory: tuple[StageMemory, ...]
    nvme_bytes_a_pass: tuple[int, ...]
    host_bytes_a_pass: tuple[int, ...]
    prediction: Prediction
    expert_slot_bytes: int = 0
    expert_slots: tuple[int, ...] = ()
    host_experts: tuple[int, ...] = ()
    graph_lanes: int = 0
    num_tails: int = 0
    host_pages: int = 0
    nvme_pages: int = 0
    kv_costs: KVCosts = field(default_factory=KVCosts)
    kv_ring_pages: int = 0
    cold_micro_batches: int = 0
    window_pages: int = 0
    hot_window: int = 0
    drafts: DraftLimits = field(default_factory=DraftLimits)
    adapter_slots: int = 0
    adapter_rank: int = 0
