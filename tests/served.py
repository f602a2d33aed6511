"""Real servers on real sockets, over an engine in this process."""

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from headrace.cluster.adapters import Adapters
from headrace.cluster.bench.local import local_engine
from headrace.cluster.cli.options import Device, RunOptions
from headrace.cluster.completion import Completion
from headrace.cluster.detokenize import StopStrings, decode
from headrace.cluster.engine import Engine
from headrace.cluster.recovery import Recovery, StageStanding
from headrace.cluster.ring_trace import RingTrace, RingTracing
from headrace.cluster.serving.server import Listener, Server, ServerOptions
from headrace.cluster.telemetry.events import EngineEvents
from headrace.scheduler.adapters import AdapterStats
from headrace.scheduler.batch_window import Gathered
from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.errors import ContextLengthError, HeadraceError
from headrace.scheduler.kv_stats import KVStats, PageCounts
from headrace.scheduler.placement import Placement, Plan, Prediction, StageMemory, Tier, Visit
from headrace.scheduler.plan import Sample, StageTimes
from headrace.scheduler.request import Priority, SamplingParams
from headrace.scheduler.speculation import DraftCounts

MODEL = "stories"


@dataclass
class Served:
    """Where a server is; its engine is its thread's. `stop` is what a signal does."""

    url: str
    engine: Any
    stop: Callable[[], None]
    grpc: str | None = None

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname and parts.port
        return parts.hostname, parts.port

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers (in small letters). A body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **(headers or {})}
        try:
            connection.request(method, path, raw, given)
            answer = connection.getresponse()
            text = answer.read().decode()
            found = {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()
        is_json = found.get("content-type") == "application/json"
        return answer.status, json.loads(text) if is_json else text, found

    def tokens(self, text: str) -> list[int]:
        return list(self.ask("POST", "/tokenize", {"prompt": text})[1]["tokens"])

    def metric(self, line: str, headers: dict[str, str] | None = None) -> float:
        """The value of one line of /metrics; 0 when there is none."""
        for each in self.ask("GET", "/metrics", headers=headers)[1].splitlines():
            if each.startswith(line + " "):
                return float(each.rpartition(" ")[2])
        return 0.0


@contextmanager
def serving(engine: Any, **options: Any) -> Iterator[Served]:
    """Serve an engine in a thread; stops the server at the end and raises what it did."""
    ready = threading.Event()
    urls: list[str] = []
    failures: list[HeadraceError] = []
    loop = asyncio.new_event_loop()
    with Listener(ServerOptions(**{"model_name": MODEL, "port": 0, "grace": 5.0, **options})) as at:
        server = Server(at, engine)

        def on_ready(url: str) -> None:
            urls.append(url)
            ready.set()

        def run() -> None:
            try:
                loop.run_until_complete(server.run(on_ready, signals=False))
            except HeadraceError as error:
                failures.append(error)
            finally:
                loop.run_until_complete(loop.shutdown_default_executor())
                ready.set()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert ready.wait(30.0)
            assert urls, failures
            yield Served(
                urls[0], engine, lambda: loop.call_soon_threadsafe(server.stop), at.grpc_address
            )
        finally:
            loop.call_soon_threadsafe(server.stop)
            thread.join(30.0)
            assert not thread.is_alive()
            loop.close()
    if failures:
        raise failures[0]


@contextmanager
def stories_engine(store: Path, **options: Any) -> Iterator[Engine]:
    """One stage in this process, with everything resident."""
    given = {"device": Device.CPU, "device_memory": "64MiB", "context": 256, **options}
    with local_engine(RunOptions(**given).engine(store)) as engine:
        yield engine


def one_stage(max_sequences: int) -> Plan:
    """Of one layer that streams from NVMe; what the planner would say of it is made up."""
    return Plan(
        placement=Placement(1, (Visit(0, (0,)),), (Tier.NVME,)),
        slot_bytes=4096,
        ring_slots=(2,),
        num_pages=10_000,
        kv_format="fp32",
        max_context=100,
        token_budget=10_000,
        max_sequences=max_sequences,
        micro_batches=1,
        micro_batch_tokens=10_000,
        logit_rows=1,
        sample_rows=1,
        graph_rows=0,
        passes_in_flight=1,
        ahead=0,
        memory=(StageMemory(0, 8192, 0, 0, 0, 0, 0, 0, 0),),
        nvme_bytes_a_pass=(4096,),
        host_bytes_a_pass=(0,),
        prediction=Prediction(max_sequences, 0.5, 2.0, "nvme", {"nvme": 0.5}),
    )


@dataclass
class _Echo:
    tokens: list[int]
    params: SamplingParams
    on_token: Callable[[Sample], None] | None
    stop: StopStrings | None
    priority: Priority
    said: list[int] = field(default_factory=list)


@dataclass
class EchoEngine:
    """Answers a prompt with itself, a token a step. No step begins before `gate` is open; it takes `pace`
    seconds and raises the `failure`, if there is one. A sequence has one page, and ends with the `error`."""

    tokenizer: Any
    max_context: int = 100
    max_sequences: int = 1000
    model_digest: str = "echo"
    max_running: int = 1000
    failure: Exception | None = None
    error: str | None = None
    pace: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)
    events: EngineEvents = field(default_factory=EngineEvents)
    aborted: list[int] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)
    classes: list[tuple[Priority, int]] = field(default_factory=list)
    passes: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    busy_seconds: float = 0.0
    adapter_wait_seconds: float = 0.0
    moves: int = 0
    num_recoveries: int = 0
    recoveries: list[Recovery] = field(default_factory=list)
    adapters: Adapters = field(default_factory=Adapters)
    tracing: RingTracing = field(default_factory=RingTracing)

    def __post_init__(self) -> None:
        self.gate.set()
        self._live: dict[int, _Echo] = {}
        self._next_id = 0

    @property
    def stats(self) -> "EchoEngine":
        return self

    @property
    def plan(self) -> Plan:
        return one_stage(self.max_running)

    @property
    def output_tokens(self) -> int:
        return self.tokens

    @property
    def bound_seconds(self) -> float:
        return self.busy_seconds / 2

    @property
    def stages(self) -> list[StageTimes]:
        """Half of the time its one stage computed, and waited for weights the rest of it."""
        return [StageTimes(0, self.busy_seconds, self.bound_seconds, 0.0, 4096 * self.passes, 0)]

    @property
    def kv(self) -> KVStats:
        return KVStats(device=PageCounts(used=len(self._live)))

    @property
    def limits(self) -> SchedulerConfig:
        most = self.max_running
        return SchedulerConfig(10_000, self.max_context, 10_000, most, 1, 10_000)

    @property
    def drafts(self) -> DraftCounts:
        return DraftCounts()

    @property
    def adapter_slots(self) -> AdapterStats:
        return AdapterStats()

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def gathered(self) -> Gathered | None:
        echoes = self._live.values()
        if not echoes or any(echo.said for echo in echoes):
            return None
        return Gathered(len(echoes), sum(len(echo.tokens) for echo in echoes))

    @property
    def num_running(self) -> int:
        return min(len(self._live), self.max_running)

    @property
    def num_waiting(self) -> int:
        return len(self._live) - self.num_running

    @property
    def batch_counts(self) -> tuple[int, int]:
        are_batch = [echo.priority is Priority.BATCH for echo in self._live.values()]
        return sum(are_batch[: self.max_running]), sum(are_batch[self.max_running :])

    def check(self, token_ids: list[int], params: SamplingParams) -> None:
        if len(token_ids) >= self.max_context:
            raise ContextLengthError("too long for an echo")

    def add(
        self,
        token_ids: list[int],
        params: SamplingParams,
        seed: int,
        *,
        tenant: str = "",
        keep: bool = False,
        priority: Priority = Priority.INTERACTIVE,
        weight: int = 1,
        adapter: str | None = None,
        on_token: Callable[[Sample], None] | None = None,
        arrived: float | None = None,
    ) -> int:
        stop = StopStrings(self.tokenizer, params) if params.stop else None
        self._next_id += 1
        self._live[self._next_id] = _Echo(token_ids, params, on_token, stop, priority)
        self.tenants.append(tenant)
        self.classes.append((priority, weight))
        return self._next_id

    def tend(self) -> None:
        """It has no stages to lose."""

    def roster(self) -> list[StageStanding]:
        return []

    def begin_trace(self, passes: int) -> None:
        self.tracing.begin(passes)

    def end_trace(self) -> Callable[[], RingTrace]:
        return self.tracing.end()

    def abort(self, request_id: int) -> None:
        del self._live[request_id]
        self.aborted.append(request_id)

    def step(self) -> list[Completion]:
        assert self.gate.wait(30.0)
        time.sleep(self.pace)
        self.busy_seconds += max(self.pace, 0.001)
        if self.failure is not None:
            raise self.failure
        running = list(self._live.items())[: self.max_running]
        self.passes, self.tokens = self.passes + 1, self.tokens + len(running)
        return [done for i, echo in running if (done := self._say(i, echo)) is not None]

    def _say(self, request_id: int, echo: _Echo) -> Completion | None:
        token = echo.tokens[len(echo.said)]
        echo.said.append(token)
        if echo.on_token is not None:
            echo.on_token(Sample(request_id, token, -1.0, ()))
        text = echo.stop.push(token) if echo.stop else None
        limit = min(len(echo.tokens), echo.params.max_tokens)
        if text is None and len(echo.said) < limit:
            return None
        reason = "length" if text is None else "stop"
        if text is None:
            text = decode(self.tokenizer, echo.said, echo.params)
        del self._live[request_id]
        reason = "abort" if self.error else reason
        return Completion(request_id, echo.said, text, reason, None, len(echo.tokens), self.error)
