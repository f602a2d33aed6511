"""A pass on its way through one stage: each micro-batch arrives, goes through layers and departs, visit by visit."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from headrace.runtime.drawn_tokens import Tokens, sampled_rows
from headrace.runtime.kv.cold_batch import ColdBatch
from headrace.runtime.kv.store import LayerPages
from headrace.runtime.ready import Ready, ReadyBatch
from headrace.runtime.sampler import Drawn, draw
from headrace.runtime.stage_config import StageConfig
from headrace.runtime.stage_links import StageLinks
from headrace.runtime.stage_start import StageParts
from headrace.runtime.trace import Kind, Tracer
from headrace.scheduler.errors import StageLostError
from headrace.scheduler.plan import MicroBatch

if TYPE_CHECKING:
    from headrace.runtime.graphs import DecodeGraphs, Lane
    from headrace.runtime.model import Prepared


@dataclass(slots=True)
class Travel:
    """One micro-batch on its way through this stage's part of a pass."""

    micro_batch: MicroBatch
    before: Tokens
    prepared: "Prepared"
    lane: "Lane | None"
    cold: ColdBatch | None = None
    x: torch.Tensor | None = None
    drawn: list[Drawn] = field(default_factory=list)


class Visits:
    """Those that the placement has a stage make in each pass. `run` is called in the stage's own stream.

    Once `broken` is set, runs fail instead of going on to the next visit.
    """

    def __init__(
        self,
        config: StageConfig,
        parts: StageParts,
        graphs: "DecodeGraphs | None",
        links: StageLinks,
        tracer: Tracer,
        broken: threading.Event,
    ) -> None:
        self._stage, self._plan = config.stage, config.plan
        self._placement = config.plan.placement
        self._device = torch.device(config.device)
        self._visits = self._placement.visits_of(config.stage)
        self._weights, self._model = parts.weights, parts.model
        self._kv, self._ring = parts.kv, parts.ring
        self._graphs, self._links, self._tracer, self._broken = graphs, links, tracer, broken

    @property
    def reads_tokens(self) -> bool:
        """Whether the stage has to know which tokens the pass before drew: to embed them, or to draw the next."""
        return self._stage in (self._placement.first_stage, self._placement.last_stage)

    def run(self, ready: Ready, drawn: Tokens) -> list[Travel]:
        """All micro-batches through all visits, queued on the device; `drawn` are tokens of the pass before."""
        travels = [self._begin(i, batch, drawn) for i, batch in enumerate(ready.batches)]
        self._weights.begin_pass(len(travels))
        self._begin_ring(travels)
        for position, visit in enumerate(self._visits):
            self._visit(position, visit, travels)
        return travels

    def _begin(self, index: int, ready: ReadyBatch, drawn: Tokens) -> Travel:
        if self.reads_tokens:
            ready.complete(drawn)
        if not ready.for_lane:
            prepared = self._model.prepare(ready.batch.to(self._device))
            return Travel(ready.micro_batch, drawn, prepared, None, ready.cold)
        assert self._graphs is not None
        lane = self._graphs.lane(index, ready)
        if lane is None:
            return self._begin(index, ReadyBatch.build(ready.micro_batch, self._device), drawn)
        return Travel(ready.micro_batch, drawn, lane.prepared, lane)

    def _begin_ring(self, travels: Sequence[Travel]) -> None:
        """Have cold pages brought in the order in which layers will need them."""
        cold = [travel.cold for travel in travels if travel.cold is not None]
        if cold:
            assert self._ring is not None, "the plan has no ring for pages in host RAM"
            visits = (self._placement.visits[visit] for visit in self._visits)
            self._ring.begin_pass(
                (layer, batch) for visit in visits for batch in cold for layer in visit.layers
            )

    def _visit(self, position: int, visit: int, travels: Sequence[Travel]) -> None:
        if self._broken.is_set():
            raise StageLostError(f"stage {self._stage}: the pass was broken off")
        with (
            self._tracer.span(Kind.VISIT, number=visit),
            self._weights.hold(position) as layers,
        ):
            for travel in travels:
                x = self._arrive(visit, travel)
                if travel.lane is None:
                    x = self._model.run_layers(layers, x, travel.prepared, self._pages_of(travel))
                else:
                    x = travel.lane.run(layers, x)
                self._depart(visit, travel, x)

    def _pages_of(self, travel: Travel) -> LayerPages:
        if travel.cold is None:
            return self._kv
        assert self._ring is not None
        return self._ring.pages(travel.cold)

    def _arrive(self, visit: int, travel: Travel) -> torch.Tensor:
        """Hidden states [tokens, hidden] before the visit: embedded, still here, or received."""
        if visit == 0:
            return travel.prepared.x
        source = self._placement.visits[visit - 1].stage
        if source == self._stage:
            assert travel.x is not None
            return travel.x
        return self._links.recv(source, travel.micro_batch.num_tokens)

    def _depart(self, visit: int, travel: Travel, x: torch.Tensor) -> None:
        travel.x = None
        if visit == len(self._placement.visits) - 1:
            with self._tracer.span(Kind.SAMPLE):
                travel.drawn = self._draw(travel, x)
            return
        target = self._placement.visits[visit + 1].stage
        if target == self._stage:
            travel.x = x
        else:
            # A lane writes its hidden states where they were.
            self._links.send(target, x if travel.lane is None else x.clone())

    def _draw(self, travel: Travel, x: torch.Tensor) -> list[Drawn]:
        rows = sampled_rows(travel.micro_batch, travel.before)
        drawn, plan = [], self._plan
        for start in range(0, len(rows), plan.logit_rows):
            chosen = travel.prepared.batch.sample_rows[start : start + plan.logit_rows]
            logits = self._model.logits(x.index_select(0, chosen))
            some = rows[start : start + plan.logit_rows]
            drawn.append(draw(logits, some, plan.sample_rows))
        return drawn
