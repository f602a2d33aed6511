"""An engine as serving sees it."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from headrace.cluster.adapters import Adapters
from headrace.cluster.completion import Completion
from headrace.cluster.job_report import Stats
from headrace.cluster.recovered import Recovery
from headrace.cluster.recovery import StageStanding
from headrace.cluster.ring_trace import RingTrace
from headrace.cluster.telemetry.events import EngineEvents
from headrace.scheduler.adapters import AdapterStats
from headrace.scheduler.batch_window import Gathered
from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.kv_stats import KVStats
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan import Adapter, Sample
from headrace.scheduler.request import Priority, SamplingParams


class EngineStats(Stats, Protocol):
    @property
    def kv(self) -> KVStats: ...

    @property
    def tokens(self) -> int: ...

    @property
    def adapter_slots(self) -> AdapterStats: ...

    @property
    def adapter_wait_seconds(self) -> float: ...

    @property
    def num_recoveries(self) -> int: ...

    @property
    def recoveries(self) -> Sequence[Recovery]: ...


class ServedEngine(Protocol):
    """The part of the engine that serving uses. Any thread may call `check` and use the tokenizer."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def model_digest(self) -> str: ...

    @property
    def adapters(self) -> Adapters: ...

    @property
    def max_context(self) -> int: ...

    @property
    def max_sequences(self) -> int: ...

    @property
    def limits(self) -> SchedulerConfig: ...

    @property
    def plan(self) -> Plan: ...

    @property
    def has_work(self) -> bool: ...

    @property
    def gathered(self) -> Gathered | None: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_running(self) -> int: ...

    @property
    def batch_counts(self) -> tuple[int, int]: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def events(self) -> EngineEvents: ...

    def check(self, token_ids: list[int], params: SamplingParams) -> None: ...

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
    ) -> int: ...

    def add_adapter(self, name: str, adapter: Adapter) -> None: ...

    def remove_adapter(self, name: str) -> None: ...

    def step(self) -> list[Completion]: ...

    def abort(self, request_id: int) -> None: ...

    def tend(self) -> None: ...

    def roster(self) -> list[StageStanding]: ...

    def begin_trace(self, passes: int) -> None: ...

    def end_trace(self) -> Callable[[], RingTrace]: ...
