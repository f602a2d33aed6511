"""Rings of real stages inside this process, over local links: every placement from one function."""

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from headrace.cluster.pipeline import LocalPipeline, Pending
from headrace.runtime.expert_extents import split_block
from headrace.runtime.kv.moves import PageLog
from headrace.runtime.kv.window import PageWindow
from headrace.runtime.memory.held import Holding
from headrace.runtime.recording import Capture
from headrace.runtime.stage import Stage
from headrace.runtime.stage_config import StageConfig
from headrace.runtime.store import Store
from headrace.scheduler.config import DraftLimits
from headrace.scheduler.errors import StageError
from headrace.scheduler.kv_format import FORMATS
from headrace.scheduler.limits import limits_of
from headrace.scheduler.moves import MoveReports
from headrace.scheduler.placement import (
    Placement,
    Plan,
    Prediction,
    StageMemory,
    Tier,
    contiguous_visits,
    cyclic_visits,
)
from headrace.scheduler.plan import Pass, Sample
from headrace.scheduler.request import Request
from headrace.scheduler.scheduler import Scheduler


class LocalEdge:
    """Both ends of an edge inside one process, between threads; on CUDA between their streams."""

    def __init__(self, edge: tuple[int, int], deadline: float) -> None:
        self._edge, self._deadline = edge, deadline
        self._queue: queue.SimpleQueue[tuple[torch.Tensor, torch.cuda.Event | None] | None] = (
            queue.SimpleQueue()
        )

    def send(self, x: torch.Tensor) -> None:
        event = None
        if x.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._queue.put((x, event))

    def collect(self) -> None:
        pass

    def recv(self, num_tokens: int) -> torch.Tensor:
        try:
            item = self._queue.get(timeout=self._deadline)
        except queue.Empty:
            item = None
        if item is None:
            raise StageError(f"edge {self._edge[0]} -> {self._edge[1]} broke")
        x, event = item
        if event is not None:
            stream = torch.cuda.current_stream(x.device)
            stream.wait_event(event)
            x.record_stream(stream)  # its memory belongs to the sender's stream
        assert len(x) == num_tokens
        return x

    def memory(self) -> Iterable[Holding]:
        return ()  # between passes nothing is on its way

    def close(self) -> None:
        self._queue.put(None)


class CallAgain:
    """What a CUDA graph does, without CUDA: the same work on the same memory."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.replays.append(0)
        place = len(self.replays) - 1

        def again() -> None:
            self.replays[place] += 1
            work()

        return again


NO_DRAFTS = DraftLimits()

NO_PREDICTION = Prediction(
    sequences=1,
    pass_seconds=1.0,
    tokens_per_second=1.0,
    bound_by="nvme",
    terms=dict.fromkeys(("nvme", "pcie", "compute", "hbm", "hops"), 1.0),
)


def manual_plan(
    store: Store,
    *,
    stages: int = 1,
    cyclic: bool = False,
    tier: Tier | Sequence[Tier] = Tier.NVME,
    token_budget: int = 4096,
    num_pages: int = 64,
    max_sequences: int = 64,
    layers_a_visit: int = 1,
    graph_rows: int = 0,
    graph_lanes: int = 16,
    expert_slots: int = 0,
    host_experts: int = 0,
    passes_in_flight: int = 1,
    ahead: int = 0,
    kv_format: str = "fp32",
    num_tails: int = 16,
    host_pages: int = 0,
    nvme_pages: int = 0,
    kv_ring_pages: int = 0,
    cold_micro_batches: int = 0,
    window_pages: int = 0,
    hot_window: int = 0,
    micro_batches: int = 0,
    max_context: int = 0,
    drafts: DraftLimits = NO_DRAFTS,
    adapter_slots: int = 0,
    adapter_rank: int = 16,
) -> Plan:
    """A plan that tests dictate: the planner's judgement is not what they are about.

    With `expert_slots` on each stage, streamed layers are split where they can be. `num_tails` counts
    where `kv_format` is quantized.
    """
    num_layers = len(store.layers)
    tiers = (tier,) * num_layers if isinstance(tier, Tier) else tuple(tier)
    make = cyclic_visits if cyclic else contiguous_visits
    placement = Placement(stages, make(num_layers, stages, layers_a_visit), tiers)
    streamed = [placement.streamed(stage) for stage in range(stages)]

    splits = {i: split_block(block) for i, block in enumerate(store.layers) if expert_slots}
    sizes = [block.nbytes for block in store.layers]
    expert_bytes = [0]
    for layer, split in splits.items():
        if split is not None and tiers[layer] is not Tier.DEVICE:
            sizes[layer] = split.dense.nbytes
            expert_bytes.extend(extent.nbytes for extent in split.experts)

    def passing(stage: int, which: Tier) -> int:
        return sum(sizes[i] for i in streamed[stage] if tiers[i] is which)

    micro_batches = micro_batches or stages
    return Plan(
        placement=placement,
        slot_bytes=max(sizes),
        ring_slots=tuple(2 * layers_a_visit if layers else 0 for layers in streamed),
        num_pages=num_pages,
        max_context=max_context or num_pages * 64,
        token_budget=token_budget,
        max_sequences=max_sequences,
        micro_batches=micro_batches,
        micro_batch_tokens=-(-token_budget // micro_batches),
        logit_rows=5,
        sample_rows=2,
        graph_rows=graph_rows,
        graph_lanes=graph_lanes,
        passes_in_flight=passes_in_flight,
        ahead=ahead,
        memory=(StageMemory(0, 0, 0, 0, 0, 0, 0, 0, 0),) * stages,
        nvme_bytes_a_pass=tuple(passing(stage, Tier.NVME) for stage in range(stages)),
        host_bytes_a_pass=tuple(passing(stage, Tier.HOST) for stage in range(stages)),
        prediction=NO_PREDICTION,
        expert_slot_bytes=max(expert_bytes),
        expert_slots=(expert_slots,) * stages,
        host_experts=(host_experts,) * stages,
        kv_format=kv_format,
        num_tails=num_tails if FORMATS[kv_format].is_quantized else 0,
        host_pages=host_pages,
        nvme_pages=nvme_pages,
        kv_ring_pages=kv_ring_pages,
        cold_micro_batches=cold_micro_batches,
        window_pages=window_pages,
        hot_window=hot_window,
        drafts=drafts,
        adapter_slots=adapter_slots,
        adapter_rank=adapter_rank,
    )


@contextmanager
def local_ring(
    path: Path,
    plan: Plan,
    device: str = "cpu",
    *,
    trace: bool = False,
    capture: Capture | None = None,
    storage: str = "auto",
    logs: Sequence[PageLog] = (),
    windows: Sequence[PageWindow | None] = (),
    deadline: float = 60.0,
    adapter_host_memory: int = 1 << 20,
) -> Iterator[LocalPipeline]:
    """`logs` keep the stages' KV pages, and `windows` those that are decoded over on NVMe, if they are
    given; they stay the caller's."""
    stages = [
        Stage(
            StageConfig(
                store=str(path),
                stage=stage,
                plan=plan,
                device=device,
                device_memory=0,
                dtype="float32",
                storage=storage,
                deadline=deadline,
                threads=torch.get_num_threads(),
                trace=trace,
                adapter_host_memory=adapter_host_memory,
            ),
            capture,
            logs[stage] if logs else None,
            windows[stage] if windows else None,
        )
        for stage in range(plan.placement.num_stages)
    ]
    edges = {edge: LocalEdge(edge, 60.0) for edge in plan.placement.edges}
    for i, stage in enumerate(stages):
        senders = {b: edge for (a, b), edge in edges.items() if a == i}
        receivers = {a: edge for (a, b), edge in edges.items() if b == i}
        stage.connect(senders, receivers)
    pipeline = LocalPipeline(stages)
    try:
        yield pipeline
    finally:
        pipeline.close()


def run_all(
    plan: Plan,
    pipeline: LocalPipeline,
    requests: Sequence[Request],
    scheduler: Scheduler | None = None,
    seen: dict[int, list[Sample]] | None = None,
) -> dict[int, list[int]]:
    """Serve `requests` to their end; their outputs by id, and what was `seen` of them pass by pass."""
    scheduler = scheduler or Scheduler(limits_of(plan))
    reports = MoveReports(plan.placement.num_stages)
    for request in requests:
        scheduler.add(request)
    outputs: dict[int, list[int]] = {}
    in_flight: deque[tuple[Pass, Pending]] = deque()
    while scheduler.has_work:
        while len(in_flight) < plan.passes_in_flight + plan.ahead:
            made = scheduler.schedule()
            if made is None:
                break
            in_flight.append((made, pipeline.submit(made)))
        a_pass, pending = in_flight.popleft()
        results = pending.result()
        samples = [sample for result in results for sample in result.samples]
        spoiled = {request for result in results for request in result.spoiled}
        update = scheduler.update(a_pass, samples, *reports.merge(results), spoiled)
        for request, sample in update.committed if seen is not None else ():
            seen.setdefault(request.request_id, []).append(sample)
        for request in update.finished:
            outputs[request.request_id] = request.output
    return outputs
