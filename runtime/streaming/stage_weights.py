"""All weights of one stage's layers: what every token needs, and experts apart where they are split."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Self

import torch

from headrace.runtime.expert_extents import SplitBlock, split_block
from headrace.runtime.manifest import Block
from headrace.runtime.memory.held import Holding
from headrace.runtime.store import Store
from headrace.runtime.streaming.expert_streamer import ExpertCounters, ExpertStreamer
from headrace.runtime.streaming.loads import Storage
from headrace.runtime.streaming.streamer import StreamCounters, Streamer
from headrace.runtime.trace import NULL_TRACER, Tracer
from headrace.scheduler.placement import Plan

if TYPE_CHECKING:
    from headrace.runtime.model import StageModel  # seconds to import, in which weights can be read

NO_EXPERTS = ExpertCounters(0, 0, 0.0, 0, 0)


@dataclass(frozen=True, slots=True)
class WeightCounters:
    """What a pass streamed: whole layers and dense parts, which the plan foretells, and experts."""

    layers: StreamCounters
    experts: ExpertCounters

    @property
    def nvme_bytes(self) -> int:
        return self.layers.nvme_bytes + self.experts.nvme_bytes

    @property
    def host_bytes(self) -> int:
        return self.layers.host_bytes + self.experts.host_bytes

    @property
    def wait_seconds(self) -> float:
        return self.layers.wait_seconds + self.experts.wait_seconds


def split_layers(store: Store, plan: Plan, stage: int) -> dict[int, SplitBlock]:
    """The stage's layers whose experts are loaded apart, in visiting order."""
    if not plan.expert_slots or not plan.expert_slots[stage]:
        return {}
    split = {layer: split_block(store.layers[layer]) for layer in plan.placement.layers_of(stage)}
    return {layer: parts for layer, parts in split.items() if parts is not None}


def most_streamed(store: Store, plan: Plan) -> int:
    """The most bytes that a pass of all stages reads from drives, with every expert reached."""
    experts = sum(
        extent.nbytes
        for stage in range(plan.placement.num_stages)
        for split in split_layers(store, plan, stage).values()
        for extent in split.experts
    )
    return sum(plan.nvme_bytes_a_pass) + experts


class StageWeights:
    """Holds a stage's layers for its visits, and has split layers of a model fetch their experts.

    The constructor begins to load them, `attach` names the model before the first visit. The storage
    stays the caller's. Raises StoreError and DoesNotFitError, as Streamer and ExpertStreamer do.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        stage: int,
        *,
        storage: Storage,
        device: torch.device,
        tracer: Tracer = NULL_TRACER,
    ) -> None:
        placement = plan.placement
        visits = [placement.visits[v].layers for v in placement.visits_of(stage)]
        self._splits = splits = split_layers(store, plan, stage)
        blocks = {layer: store.layers[layer] for layer in placement.layers_of(stage)}
        self._split_visits = [[i for i in layers if i in splits] for layers in visits]
        self._experts: ExpertStreamer | None = None
        with ExitStack() as opened:
            self._layers = opened.enter_context(
                Streamer(
                    visits=visits,
                    blocks=_without_experts(blocks, splits),
                    tiers={layer: placement.tiers[layer] for layer in blocks},
                    storage=storage,
                    device=device,
                    ring_slots=plan.ring_slots[stage],
                    slot_bytes=plan.slot_bytes,
                    tracer=tracer,
                )
            )
            if splits:
                self._experts = opened.enter_context(
                    ExpertStreamer(
                        blocks={layer: blocks[layer] for layer in splits},
                        splits=splits,
                        storage=storage,
                        device=device,
                        slots=plan.expert_slots[stage],
                        slot_bytes=plan.expert_slot_bytes,
                        host_slots=plan.host_experts[stage] if plan.host_experts else 0,
                        held=self._held(splits) if plan.micro_batches > 1 else 0,
                        tracer=tracer,
                    )
                )
            self._opened = opened.pop_all()

    def attach(self, model: "StageModel") -> None:
        """Have the split layers of `model` fetch their experts here."""
        if self._experts is not None:
            for layer, split in self._splits.items():
                model.split(layer, split.experts, partial(self._experts.fetch, layer))

    def _held(self, splits: Mapping[int, SplitBlock]) -> int:
        """The most experts of a visit."""
        return max(sum(len(splits[i].experts) for i in layers) for layers in self._split_visits)

    def wait_resident(self) -> None:
        """Return when the layers that stay where they are are there. Raises StoreError."""
        self._layers.wait_resident()

    @property
    def resident(self) -> Mapping[int, torch.Tensor]:
        """The bytes of the layers that stay where they are; what they hold is the caller's affair."""
        return self._layers.resident

    def begin_pass(self, micro_batches: int) -> None:
        """Every visit of the next pass runs its layers once for each of so many micro-batches."""
        if self._experts is not None:
            order = [i for layers in self._split_visits for i in layers * micro_batches]
            self._experts.begin_pass(order)

    def rewind(self) -> None:
        """The next pass begins anew, after one that was broken off."""
        self._layers.rewind()
        self.take_counters()

    def hold(self, visit: int) -> AbstractContextManager[list[tuple[int, torch.Tensor]]]:
        """Streamer.hold: the visit's layers and their bytes, without experts where they are split."""
        return self._layers.hold(visit)

    def take_counters(self) -> WeightCounters:
        """What was streamed since the last call."""
        experts = NO_EXPERTS if self._experts is None else self._experts.take_counters()
        return WeightCounters(self._layers.take_counters(), experts)

    def wait_host_tier(self) -> None:
        """Return when everything that belongs in host RAM is there."""
        self._layers.wait_host_tier()
        if self._experts is not None:
            self._experts.wait_host_tier()

    def memory(self) -> Iterator[Holding]:
        """What is held for layers and experts, by tier."""
        yield from self._layers.memory()
        if self._experts is not None:
            yield from self._experts.memory()

    def close(self) -> None:
        """End the loads under way and free every byte."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _without_experts(
    blocks: Mapping[int, Block], splits: Mapping[int, SplitBlock]
) -> dict[int, Block]:
    return {
        layer: replace(block, nbytes=splits[layer].dense.nbytes) if layer in splits else block
        for layer, block in blocks.items()
    }
