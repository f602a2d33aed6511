"""What a stage is made of, made in such an order that the drive has something to read all the time.

Importing models' code takes seconds. It is imported when the first weights are being read.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headrace.runtime.kv.handover import Contexts
from headrace.runtime.kv.host import HostPages
from headrace.runtime.kv.identity import PageIdentity
from headrace.runtime.kv.moves import PageLog, PageMover
from headrace.runtime.kv.ring import KVRing
from headrace.runtime.kv.store import KVStore
from headrace.runtime.kv.window import PageWindow
from headrace.runtime.matmul.room import tuning_bytes
from headrace.runtime.stage_config import StageConfig
from headrace.runtime.store import Store
from headrace.runtime.streaming.block_reads import BlockReads
from headrace.runtime.streaming.stage_weights import StageWeights, most_streamed
from headrace.runtime.streaming.storage import Storage, choose_storage
from headrace.runtime.trace import Tracer
from headrace.scheduler.kv_format import FORMATS
from headrace.scheduler.pages import pages_for

if TYPE_CHECKING:
    from headrace.runtime.adapters.loader import AdapterLoader
    from headrace.runtime.graphs import DecodeGraphs
    from headrace.runtime.model import ReadBlock, StageModel
    from headrace.runtime.recording import Capture


@dataclass(frozen=True, slots=True)
class StageParts:
    """A stage's weights and where they are read from, the model that they are of, and KV pages.

    `contexts` hands pages over to another stage. `moves` is None where pages have no host slots to go to, `ring` where none come from there to
    be attended to, `adapters` where there are no slots for them.
    """

    storage: Storage
    weights: StageWeights
    model: "StageModel"
    kv: KVStore
    contexts: Contexts
    moves: PageMover | None
    ring: KVRing | None
    adapters: "AdapterLoader | None"


class StageStart:
    """Makes the parts of the stage that `config` describes, on the current stream of `device`.

    `pages` is where KV pages go from host slots, if anywhere, and `window` where they are decoded over on
    NVMe; both stay the caller's.
    """

    def __init__(
        self,
        config: StageConfig,
        device: torch.device,
        tracer: Tracer,
        pages: PageLog | None = None,
        window: PageWindow | None = None,
    ) -> None:
        self._config, self._device, self._tracer, self._pages = config, device, tracer, pages
        self._window = window
        self._plan, self._placement = config.plan, config.plan.placement
        self._layers = self._placement.layers_of(config.stage)
        self._store = Store.open(Path(config.store))
        first, last = (
            config.stage == end for end in (self._placement.first_stage, self._placement.last_stage)
        )
        self._store.require(self._store.blocks_of(self._layers, first=first, last=last))
        self._dtype: torch.dtype = getattr(torch, config.dtype)

    def make(self, opened: ExitStack) -> StageParts:
        """The parts, which `opened` closes. Raises StoreError and DoesNotFitError."""
        storage = self._choose_storage()
        opened.callback(storage.close)
        ends = opened.enter_context(self._read_ends(storage))
        weights = None
        if self._tunes_beside():
            weights = opened.enter_context(self._make_weights(storage))
        model = self._make_model(ends.take)
        opened.callback(model.close)
        self._tune(model)
        if weights is None:
            weights = opened.enter_context(self._make_weights(storage))
        weights.attach(model)
        shapes = {layer: self._store.layer_shapes[layer] for layer in self._layers}
        plan, fmt = self._plan, FORMATS[self._plan.kv_format]
        kv = KVStore(shapes, plan.num_pages, self._dtype, self._device, fmt, plan.num_tails)
        weights.wait_resident()
        self._pack(model, weights)
        moves, ring = self._make_mover(kv, opened)  # last: pinning slows other calls of the driver
        host = None if moves is None else moves.host
        contexts = Contexts(kv, host, PageIdentity.of(self._config))
        adapters = self._make_adapters(model, opened)
        return StageParts(storage, weights, model, kv, contexts, moves, ring, adapters)

    def _make_mover(self, kv: KVStore, opened: ExitStack) -> tuple[PageMover | None, KVRing | None]:
        count, ring_pages = self._plan.host_pages, self._plan.kv_ring_pages
        if not count:
            return None, None
        host = HostPages({i: kv.page_bytes(i) for i in kv.layers}, count, self._device)
        mover = PageMover(kv, host, self._device, self._pages, self._tracer, self._window)
        moves = opened.enter_context(mover)
        if not ring_pages:
            return moves, None
        ring = KVRing(kv, host, ring_pages, self._device, self._tracer, window=self._window)
        return moves, opened.enter_context(ring)

    def _make_adapters(self, model: "StageModel", opened: ExitStack) -> "AdapterLoader | None":
        from headrace.runtime.adapters.loader import AdapterLoader
        from headrace.runtime.adapters.matrices import StageMatrices, like

        slots, rank = self._plan.adapter_slots, self._plan.adapter_rank
        if not slots:
            return None
        places, made_like = model.adapter_places(), like(self._dtype, self._device)
        loader = AdapterLoader(
            places,
            StageMatrices(places.linears, slots, rank, model.adapted, made_like),
            rank=rank,
            host_bytes=self._config.adapter_host_memory,
            dtype=self._dtype,
            device=self._device,
        )
        return opened.enter_context(loader)

    def _choose_storage(self) -> Storage:
        blocks = [self._store.layers[layer] for layer in self._layers]
        sample = max(blocks, key=lambda block: block.nbytes)
        return choose_storage(
            self._device,
            sample.file,
            sample.data_offset,
            sample.nbytes,
            self._config.storage,
            streamed_bytes=most_streamed(self._store, self._plan),
            tracer=self._tracer,
        )

    def _read_ends(self, storage: Storage) -> BlockReads:
        """Begins to read what lies before and after the layers, where this stage needs it."""
        reads, stage, placement = BlockReads(storage), self._config.stage, self._placement
        head = stage == placement.last_stage
        if stage == placement.first_stage or (head and self._store.tied):
            reads.begin(self._store.embed, torch.device("cpu"))
        if head:
            reads.begin(self._store.head, self._device)
        return reads

    def _make_weights(self, storage: Storage) -> StageWeights:
        return StageWeights(
            self._store,
            self._plan,
            self._config.stage,
            storage=storage,
            device=self._device,
            tracer=self._tracer,
        )

    def _make_model(self, read: "ReadBlock") -> "StageModel":
        from headrace.runtime.model import StageModel

        stage, placement = self._config.stage, self._placement
        return StageModel(
            self._store,
            self._layers,
            device=self._device,
            dtype=self._dtype,
            with_embedding=stage == placement.first_stage,
            with_head=stage == placement.last_stage,
            read=read,
            tracer=self._tracer,
            fp8_products=self._config.fp8_products,
        )

    def _tunes_beside(self) -> bool:
        """Whether the device has room to try products while it holds weights; KV comes later."""
        memory, store = self._plan.memory[self._config.stage], self._store
        taken = memory.resident + memory.ring + memory.experts + memory.head + memory.scratch
        needed = max(
            tuning_bytes(store.layers[i].nbytes, store.layer_shapes[i].parameters, self._dtype)
            for i in self._layers
        )
        return self._device.type == "cpu" or taken + needed <= self._config.device_memory

    def _tune(self, model: "StageModel") -> None:
        """Find the fastest way to multiply, while no kernels run on the device."""
        if self._device.type == "cuda":
            from headrace.runtime.matmul.tuning import tune

            decodes = -(-self._plan.max_sequences // self._plan.micro_batches)
            tune(self._device, model.four_bit_products(), decodes, self._dtype)

    def _pack(self, model: "StageModel", weights: StageWeights) -> None:
        """Resident layers take the layout that decodes fastest."""
        from headrace.runtime.matmul.packed_cpu import choose_layout

        if not weights.resident:
            return
        layout = choose_layout(self._device, self._dtype, self._plan.max_sequences)
        if layout is not None:
            for layer, data in weights.resident.items():
                model.pack(layer, data, layout)


def make_graphs(
    config: StageConfig, parts: StageParts, capture: "Capture | None"
) -> "DecodeGraphs | None":
    """The graphs that the plan has room for; None where it has none, or nothing to `capture` them."""
    from headrace.runtime.graphs import DecodeGraphs

    plan = config.plan
    if capture is None or not plan.graph_rows:
        return None
    static = sum(map(parts.model.is_static, plan.placement.layers_of(config.stage)))
    return DecodeGraphs(
        parts.model,
        parts.kv,
        capture,
        max_rows=plan.graph_rows,
        max_pages=pages_for(plan.max_context),
        max_lanes=plan.graph_lanes,
        max_layers=plan.graph_lanes * (static + 1),
    )
