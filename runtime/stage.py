"""One stage: executes its part of each pass. It decides nothing; pass and placement decide."""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

import torch

from headrace.runtime.drawn_tokens import DrawnTokens
from headrace.runtime.kv.handover import Contexts
from headrace.runtime.kv.moves import PageLog
from headrace.runtime.kv.ring import NOTHING_BROUGHT
from headrace.runtime.kv.window import PageWindow
from headrace.runtime.link import Receiver, ReceiveRing, Sender, wait_event
from headrace.runtime.memory.held import Holding, Owner
from headrace.runtime.ready import Ready, ReadyBatch
from headrace.runtime.recorder import Recorder, make_recorder
from headrace.runtime.stage_config import StageConfig
from headrace.runtime.stage_links import StageLinks
from headrace.runtime.stage_moves import StageMoves
from headrace.runtime.stage_start import StageParts, StageStart, make_graphs
from headrace.runtime.streaming.streamer import StreamCounters
from headrace.runtime.trace import KEPT_PASSES, NULL_TRACER, SwitchTracer, Trace
from headrace.runtime.verification import verified
from headrace.runtime.visits import Travel, Visits
from headrace.scheduler.errors import StageError, StoreError
from headrace.scheduler.plan import Adapter, MicroBatch, Pass, PassResult, StageTimes

if TYPE_CHECKING:
    from headrace.runtime.recording import Capture


class Stage:
    """Owns the weights, KV pages and links of one device.

    `connect` gives it its neighbours; a stage without neighbours needs none. `capture` makes the
    graphs of decodes, on CUDA by default. `pages` keeps KV pages on NVMe, and `window` has those that
    are decoded over there, if there are such places; both stay the caller's. Errors: StoreError for damaged weights, StageLostError for a peer that is
    gone or late, DoesNotFitError for host memory that turns out not to be there.
    """

    def __init__(
        self,
        config: StageConfig,
        capture: "Capture | None" = None,
        pages: PageLog | None = None,
        window: PageWindow | None = None,
    ) -> None:
        self.config = config
        self.device = torch.device(config.device)
        self._plan = config.plan
        self._drawn = DrawnTokens(config.plan.passes_in_flight)
        self._closed, self._broken = threading.Event(), threading.Event()
        # The default stream would serialize compute with copies.
        self._compute = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if self.device.type == "cpu":
            torch.set_num_threads(config.threads)
        with self._on_device(), ExitStack() as opened:
            self.tracer = SwitchTracer()
            self._links = StageLinks(self.device, self.tracer)
            self._recorder: Recorder | None = None
            if config.trace:
                self.begin_trace(KEPT_PASSES)
            parts = StageStart(config, self.device, self.tracer, pages, window).make(opened)
            self._storage, self._weights = parts.storage, parts.weights
            self._model, self._kv, self._moves = parts.model, parts.kv, parts.moves
            self._ring, self._contexts = parts.ring, parts.contexts
            self._adapters = parts.adapters
            self._beside = StageMoves(config.stage, parts.moves, parts.adapters)
            self._graphs = make_graphs(config, parts, capture or self._capture(parts))
            self._visits = Visits(
                config, parts, self._graphs, self._links, self.tracer, self._broken
            )
            self._opened = opened.pop_all()

    def _capture(self, parts: StageParts) -> "Capture | None":
        if self._compute is None:
            return None
        from headrace.runtime.recording import CudaCapture

        return CudaCapture(parts.model.interruptions, self.tracer)

    @property
    def storage_name(self) -> str:
        return self._storage.name

    def begin_trace(self, passes: int) -> None:
        """Record what the stage does from the next pass on, of the newest `passes` passes. Does nothing when
        that is done already. No pass is under way."""
        if self._recorder is None:
            with self._on_device():
                self._recorder = make_recorder(self.device, passes)
            self.tracer.turn(self._recorder)

    def end_trace(self) -> Trace | None:
        """What was recorded, if anything was; no more is. No pass is under way."""
        self.tracer.turn(NULL_TRACER)
        recorder, self._recorder = self._recorder, None
        return None if recorder is None else recorder.take()

    def wait_host_tier(self) -> None:
        """Return when all that belongs in host RAM is there: before measuring, or to fail early."""
        self._weights.wait_host_tier()
        if self._moves is not None:
            self._moves.wait_host()

    def memory(self) -> Iterator[Holding]:
        """All that the stage keeps between passes, under the plan's names and a few of their own. Its places on
        NVMe are the caller's, and so is what they hold. No pass is under way."""
        host = None if self._moves is None else self._moves.host
        kept: list[Owner | None] = [self._weights, self._model, self._kv, host, self._ring]
        kept += [self._adapters, self._graphs, self._storage, self._links]
        for owner in kept:
            if owner is not None:
                yield from owner.memory()

    @contextmanager
    def contexts(self) -> Iterator[Contexts]:
        """What the stage holds for requests, to be handed over between passes, when moves have ended."""
        with torch.inference_mode(), self._on_device():
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            yield self._contexts
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def attach(self, pages: PageLog, window: PageWindow | None) -> None:
        """Have places on NVMe, of a stage that was made without; they stay the caller's."""
        assert self._moves is not None
        self._moves.attach(pages, window)
        if self._ring is not None and window is not None:
            self._ring.attach(window)

    def check_adapter(self, adapter: Adapter) -> None:
        """StoreError when it could not be applied to this stage's layers, or there are no slots. Any thread."""
        if self._adapters is None:
            raise StoreError("the engine has no slots for adapters: start it with --adapter-slots")
        self._adapters.check(adapter)

    def end_moves(self) -> None:
        """Let moves of KV pages under way end and begin no more, so that their log can be closed. No
        pass succeeds afterwards. Any thread; safe to call twice."""
        if self._moves is not None:
            self._moves.close()

    def receive_ring(self) -> ReceiveRing:
        """Buffers for incoming hidden states: one more than the micro-batches of a pass."""
        plan = self._plan
        with self._on_device():
            return ReceiveRing(
                plan.micro_batches + plan.cold_micro_batches + 1,
                plan.micro_batch_tokens,
                self._model.hidden_size,
                self._model.dtype,
                self.device,
            )

    def connect(self, senders: Mapping[int, Sender], receivers: Mapping[int, Receiver]) -> None:
        """Take over the ends of the edges to other stages, by peer."""
        self._links.connect(senders, receivers)

    def disconnect(self) -> None:
        """Close the ends of edges, which no pass uses any more, with their buffers. Safe to call twice."""
        self._links.close()

    def break_off(self) -> None:
        """Have the pass under way fail soon, and later ones at once, until `rewind`. Any thread."""
        self._broken.set()
        self._links.abort()

    def rewind(self) -> None:
        """Forget passes that were broken off: weights and pages stay, and the next pass begins anew, as soon
        as there are edges. Moves of pages end first, and nobody hears of them."""
        with torch.inference_mode(), self._on_device():
            self.disconnect()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._weights.rewind()
            self._beside.wait("what follows", self.config.deadline)
            self._beside.take()
            if self._ring is not None:
                self._ring.begin_pass(())
                self._ring.take()
            self._links.take_wait()
        self._broken.clear()

    def prepare(self, a_pass: Pass) -> Ready:
        """What can be done of a pass before the one before it ends. Any thread may, while that runs."""
        batches = [self._prepare(i, batch) for i, batch in enumerate(a_pass.micro_batches)]
        return Ready(a_pass.step, a_pass.follows, batches, a_pass.moves, a_pass.adapters)

    def _prepare(self, index: int, batch: MicroBatch) -> ReadyBatch:
        if batch.num_cold:
            quantized, host_pages = self._kv.is_quantized, self._plan.host_pages
            return ReadyBatch.build_cold(
                batch, self.device, quantized=quantized, host_pages=host_pages
            )
        for_lane = self._graphs.ready(index, batch) if self._graphs else None
        return for_lane or ReadyBatch.build(batch, self.device)

    def run(self, ready: Ready, before: PassResult | None = None) -> PassResult:
        """Execute this stage's visits of a pass; blocks until the device has finished them.

        The stage of the first visit gets the result of the pass that this one follows, if it is not
        the stage that drew it itself.
        """
        try:
            with torch.inference_mode(), self._on_device(), self.tracer.one_pass(ready.step):
                if before is not None:
                    self._drawn.note(before)
                result = self._run(ready)
                self._drawn.note(result)
                return result
        except torch.OutOfMemoryError as error:
            raise StageError(
                f"stage {self.config.stage} ran out of its device memory in pass {ready.step}: "
                f"{str(error).splitlines()[0]} Lower --token-budget or raise --device-memory"
            ) from error

    def _run(self, ready: Ready) -> PassResult:
        started = time.perf_counter()
        self._beside.begin(ready)
        if not ready.batches:
            waited = self._beside.wait(f"pass {ready.step}", self.config.deadline)
            return self._result(ready.step, (), time.perf_counter() - started, waited)
        reads_tokens = self._visits.reads_tokens
        drawn = self._drawn.before(ready.step, ready.follows) if reads_tokens else {}
        travels = self._visits.run(ready, drawn)
        self._finish()
        return self._result(ready.step, travels, time.perf_counter() - started)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            wait_event(event, self.config.deadline, f"stage {self.config.stage}'s part of a pass")

    def _result(
        self, step: int, travels: Sequence[Travel], seconds: float, kv_wait: float = 0.0
    ) -> PassResult:
        counters = self._weights.take_counters()
        self._check_streamed(step, counters.layers, computed=bool(travels))
        ended, loads = self._beside.take()
        brought = NOTHING_BROUGHT if self._ring is None else self._ring.take()
        times = StageTimes(
            stage=self.config.stage,
            total=seconds,
            weights_wait=counters.wait_seconds,
            link_wait=self._links.take_wait(),
            nvme_bytes=counters.nvme_bytes,
            host_bytes=counters.host_bytes,
            experts_used=counters.experts.used,
            experts_loaded=counters.experts.loaded,
            kv_wait=kv_wait + brought.seconds,
            kv_out_bytes=ended.out_bytes,
            kv_in_bytes=ended.in_bytes,
            kv_cold_bytes=brought.nbytes,
            kv_sunk_bytes=brought.sunk_bytes,
            adapter_bytes=loads.nbytes,
        )
        found = (verified(travel.micro_batch, travel.drawn) for travel in travels if travel.drawn)
        samples = tuple(chain.from_iterable(found))
        return PassResult(
            step,
            samples,
            times,
            (*ended.moved, *loads.done),
            (*ended.lost, *(number for number, _ in loads.failed)),
            brought.spoiled,
            loads.failed,
        )

    def _check_streamed(self, step: int, layers: StreamCounters, *, computed: bool) -> None:
        """StageError when a pass did not stream what the plan says: nothing, where it computed nothing."""
        stage, plan = self.config.stage, self._plan
        planned = plan.nvme_bytes_a_pass[stage], plan.host_bytes_a_pass[stage]
        if not computed:
            planned = 0, 0
        if (layers.nvme_bytes, layers.host_bytes) != planned:
            raise StageError(
                f"stage {stage} streamed {layers.nvme_bytes} bytes from NVMe and "
                f"{layers.host_bytes} from host RAM in pass {step}; the plan says "
                f"{planned[0]} and {planned[1]}"
            )

    def _on_device(self) -> AbstractContextManager[Any]:
        """Compute, and memory that compute will use, belong to one stream."""
        return nullcontext() if self._compute is None else torch.cuda.stream(self._compute)

    def close(self) -> None:
        """Drop the edges and free the device. Safe to call twice."""
        if self._closed.is_set():
            return
        self._closed.set()
        self.disconnect()
        with self._on_device():
            self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
