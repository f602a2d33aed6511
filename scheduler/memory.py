"""How many bytes a stage needs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from headrace.scheduler.experts import transit_slots
from headrace.scheduler.inputs import Budget, ModelShape
from headrace.scheduler.placement import StageMemory, Visit, spread

LOGIT_ROWS = 256
"""The head turns at most this many rows into logits at a time, and fewer in smaller passes."""

LOGIT_BYTES = 6
"""Per logit: the head's own type and float32."""

GRAPH_LAYER_BYTES = 640 << 10
"""What the driver takes for a layer in a CUDA graph, on the large side: 604 KiB for 64 kernels on an
H200."""

LANE_ROWS = 3
"""Rows of the hidden size that a lane of decodes keeps per sequence: embedded, in the layers, and
the rotation's."""

EXPERT_ROWS = 2
"""More of them, of a mixture: what experts read and what they add to."""

SLOT_ALIGNMENT = 4096
"""Of host slots for KV pages, so that files are read into them and written from them directly."""

SPARE_SHARE = 16
"""One host slot in so many, and at least one, is held by no request."""

KV_RING_SLOTS = 2
"""Slots of a KV ring: over the pages in one a layer attends while others are brought into the next."""

WINDOW_THREADS = 4
"""Threads of a stage that read KV pages from slots on NVMe for attention."""

WINDOW_PIECE_BYTES = 1 << 20
"""Most bytes of one of their reads, unless a page's part is larger. Weights are read by twice as many
threads in pieces of 8 MiB, and so have most of the drive."""

WINDOW_BUFFERS = 8
"""Of such pieces: those of the threads that read and write, and some that are kept."""

WINDOW_ENTRY_BYTES = 32
"""What is kept in RAM of a layer's part of a slot on NVMe: checksum, nonce and tag."""

SAMPLE_BYTES = 72
"""Per logit of a row that is being sampled: in float64 scaled, sorted, summed and masked."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How layers are cut into visits and passes into micro-batches; which tier is not yet said.

    `ring_slots` is for a stage that cannot keep all its layers; `layers[stage]` in ring order.
    `resident` layers of each stage are kept if it is given, else as many as fit. CUDA graphs are made
    for at most `graph_rows` decodes, in `graph_lanes` lanes. `split`: experts are apart from their
    layers, in slots.
    """

    visits: tuple[Visit, ...]
    layers: tuple[tuple[int, ...], ...]
    ring_slots: int
    token_budget: int
    micro_batches: int
    passes_in_flight: int
    resident: int | None = None
    graph_rows: int = 0
    graph_lanes: int = 0
    split: bool = False

    @property
    def num_stages(self) -> int:
        return len(self.layers)

    @property
    def micro_batch_tokens(self) -> int:
        return -(-self.token_budget // self.micro_batches)

    @property
    def logit_rows(self) -> int:
        return max(1, min(LOGIT_ROWS, self.token_budget // 16))

    @property
    def sample_rows(self) -> int:
        return max(2, self.logit_rows // 16)


LEAVING_SHARE = 4
"""One in so many sequences whose full pages lie in host RAM has a page that has just become full and is
on its way out. Where more have, some of them wait for a pass."""


def guest_pages(guests: int) -> int:
    """Device pages of so many sequences whose full pages lie in host RAM: their newest, and some more."""
    return guests + -(-guests // LEAVING_SHARE)


@dataclass(frozen=True, slots=True)
class Cache:
    """Room for keys and values of so many `sequences` at once, of so many `pages` each.

    `guests` more have theirs in host RAM; a pass has up to `cold_batches` micro-batches of them, each of
    at most `ring_pages` pages. `sunk` of their pages have no room there and lie on NVMe, where there are
    `window_pages` slots for them.
    """

    sequences: int
    pages: int
    guests: int = 0
    cold_batches: int = 0
    ring_pages: int = 0
    sunk: int = 0
    window_pages: int = 0

    @property
    def num_pages(self) -> int:
        """On the device."""
        return self.sequences * self.pages + guest_pages(self.guests)

    @property
    def in_all(self) -> int:
        return self.sequences + self.guests


def activation_bytes(shape: ModelShape, layout: Layout, has_head: bool) -> int:
    """Peak of one stage's activations, an estimate from what is alive at once.

    A layer holds per token of its micro-batch about six rows of the hidden size (residual, normed
    input, query, key and value, attention output, projection) and three of the MLP (gate, up and
    their product). Latents make attention wider than that: beside what it multiplies there are about
    ten rows, for DeepSeek-V3's queries are 3.4 wide before and after their rotation. Between visits the hidden states of all micro-batches wait; with several stages
    in buffers to receive, one more than micro-batches, and as many are kept that were sent. Logits
    are made and sampled a few rows at a time; attention works tile by tile. CUDA graphs have their
    own memory for a layer's.
    """
    columns = 6 * shape.hidden_size + 3 * shape.intermediate_size
    if shape.attention_size:
        columns = max(columns, 10 * shape.hidden_size + shape.attention_size)
    layer = (layout.micro_batch_tokens + layout.graph_rows) * columns * shape.compute_bytes
    tokens = layout.token_budget
    if layout.num_stages > 1:
        tokens = 2 * (layout.token_budget + layout.micro_batch_tokens)
    waiting = tokens * shape.hidden_size * shape.compute_bytes
    a_logit = layout.logit_rows * LOGIT_BYTES + layout.sample_rows * SAMPLE_BYTES
    return layer + waiting + (a_logit * shape.vocab_size if has_head else 0)


def graph_bytes(shape: ModelShape, layout: Layout, stage: int) -> int:
    """What CUDA graphs take of a stage: for each lane its rows and all layers recorded once, and as
    much as a layer for what precedes them."""
    layers = layout.layers[stage]
    rows = LANE_ROWS + EXPERT_ROWS * any(map(shape.is_mixture, layers))
    rows *= layout.graph_rows * shape.hidden_size * shape.compute_bytes
    return layout.graph_lanes * ((len(layers) + 1) * GRAPH_LAYER_BYTES + rows)


def page_bytes(shape: ModelShape, layout: Layout, stage: int) -> int:
    """One KV page over all of the stage's layers."""
    return sum(shape.layer_kv_bytes[layer] for layer in layout.layers[stage])


def slot_bytes(page_bytes: int) -> int:
    """A host slot for one KV page of so many bytes over all of a stage's layers."""
    return -(-page_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def window_slot_bytes(layer_bytes: Iterable[int]) -> int:
    """A slot on NVMe for one KV page, each layer's part of which is read alone."""
    return sum(map(slot_bytes, layer_bytes))


def window_host_bytes(shape: ModelShape, layout: Layout, stage: int, cache: Cache) -> int:
    """Host memory for pages on their way between NVMe and the KV ring: where each slot of the ring is
    read to, buffers of the threads that read, and what tells good pages from others."""
    if not cache.window_pages:
        return 0
    largest = max(shape.layer_kv_bytes[layer] for layer in layout.layers[stage])
    buffers = WINDOW_BUFFERS * (max(WINDOW_PIECE_BYTES, slot_bytes(largest)) + SLOT_ALIGNMENT)
    tables = cache.window_pages * len(layout.layers[stage]) * WINDOW_ENTRY_BYTES
    return kv_ring_bytes(shape, layout, stage, cache.ring_pages) + buffers + tables


def host_pages(shape: ModelShape, layout: Layout, budgets: Sequence[Budget], cache: Cache) -> int:
    """KV pages for which every stage has a slot in its host memory."""

    def most(stage: int, budget: Budget) -> int:
        room = budget.kv_host_memory - window_host_bytes(shape, layout, stage, cache)
        return max(0, room) // slot_bytes(page_bytes(shape, layout, stage))

    return min(most(stage, budget) for stage, budget in enumerate(budgets))


def lendable_slots(count: int) -> int:
    """How many of `count` host slots requests may hold: loads and copies go through the others."""
    return max(0, count - max(1, count // SPARE_SHARE))


def kv_ring_bytes(shape: ModelShape, layout: Layout, stage: int, ring_pages: int) -> int:
    """Slots that each have room for so many pages of any of the stage's layers."""
    largest = max(shape.layer_kv_bytes[layer] for layer in layout.layers[stage])
    return KV_RING_SLOTS * ring_pages * largest


def adapter_bytes(shape: ModelShape, layout: Layout, stage: int) -> int:
    """All slots for adapters over the stage's layers."""
    if not shape.layer_adapter_bytes:
        return 0
    return sum(shape.layer_adapter_bytes[layer] for layer in layout.layers[stage])


def tail_bytes(shape: ModelShape, layout: Layout, stage: int) -> int:
    """One sequence's newest page over all of the stage's layers, where full ones are quantized."""
    if not shape.layer_tail_bytes:
        return 0
    return sum(shape.layer_tail_bytes[layer] for layer in layout.layers[stage])


def without_weights(shape: ModelShape, layout: Layout, stage: int, cache: Cache) -> StageMemory:
    has_head = stage == layout.visits[-1].stage
    activations = activation_bytes(shape, layout, has_head)
    if layout.num_stages > 1:  # a buffer for each micro-batch that is received
        a_batch = layout.micro_batch_tokens * shape.hidden_size * shape.compute_bytes
        activations += cache.cold_batches * a_batch
    embeds = stage == layout.visits[0].stage
    head = shape.head_bytes - (shape.tied_bytes if embeds else 0)
    return StageMemory(
        resident=0,
        ring=0,
        head=head if has_head else 0,
        kv=cache.num_pages * page_bytes(shape, layout, stage),
        kv_ring=kv_ring_bytes(shape, layout, stage, cache.ring_pages),
        tails=cache.in_all * tail_bytes(shape, layout, stage),
        scratch=shape.largest_matrix * shape.compute_bytes if shape.needs_scratch else 0,
        activations=activations,
        host_layers=0,
        embed=shape.embed_bytes if embeds else 0,
        process=0,
        graphs=graph_bytes(shape, layout, stage),
        adapters=adapter_bytes(shape, layout, stage),
    )


def least_memory(shape: ModelShape, layout: Layout, stage: int, cache: Cache) -> StageMemory:
    """The least that the stage can run in with `cache`: a ring, or its few layers if smaller.

    A layout without a ring keeps all layers, and one that says how many it keeps has room for them.
    A split one has slots for the experts that are on their way.
    """
    memory = without_weights(shape, layout, stage, cache)
    memory = replace(memory, experts=transit_bytes(shape, layout, stage))
    layers, held = layout.layers[stage], shape.held_bytes(split=layout.split)
    resident = sum(held[layer] for layer in layers)
    ring = layout.ring_slots * max(held)
    if layout.resident is not None and layout.resident < len(layers):
        kept = spread_out(layers, layout.resident)
        return replace(memory, resident=sum(held[i] for i in kept), ring=ring)
    if layout.resident is not None or not layout.ring_slots or resident <= ring:
        return replace(memory, resident=resident)
    return replace(memory, ring=ring)


def transit_bytes(shape: ModelShape, layout: Layout, stage: int) -> int:
    if not layout.split:
        return 0
    slots = transit_slots(shape, layout.visits, stage, layout.micro_batches)
    return slots * shape.expert_bytes


def spread_out(layers: tuple[int, ...], count: int) -> frozenset[int]:
    """`count` of the layers, evenly spaced; all if there are no more."""
    chosen = spread(len(layers), min(count, len(layers)))
    return frozenset(layer for layer, yes in zip(layers, chosen, strict=True) if yes)
