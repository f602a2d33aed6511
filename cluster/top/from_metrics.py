"""All rings of a Ray cluster, from the metrics that its nodes show."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

from headrace.cluster.recovered import KINDS
from headrace.cluster.telemetry import table
from headrace.cluster.telemetry.table import MetricSpec
from headrace.cluster.top.counters import Readings, Sample, parse
from headrace.cluster.top.view import PARTS, RecoveryView, RingView, StageView
from headrace.scheduler.errors import HeadraceError

_PREFIX = "ray_headrace_"
_TIERS = {
    "NVMe": ("nvme", "weights"),
    "host": ("host", "weights"),
    "KV NVMe": ("nvme", "kv"),
    "KV host": ("host", "kv"),
}
_PHASES = (
    "breaking off", "starting", "loading", "connecting", "waiting for a place", "planning anew",
)  # fmt: skip


class MetricsSource:
    """Asks each node's metrics agent, at these URLs. Rates are known once two reports of Ray's processes have come,
    of which there is one every 10 seconds."""

    warm_up = 24.0

    def __init__(
        self,
        place: str,
        urls: Sequence[str],
        find_again: Callable[[], list[str]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`find_again` says where the nodes are after nothing was found at `urls`."""
        self.place = place
        self._urls, self._find_again, self._clock = list(urls), find_again, clock
        self._is_lost = False
        self._readings = Readings()

    def look(self) -> list[RingView]:
        if self._is_lost and self._find_again is not None:
            self._urls = self._find_again()
        rings = self._look()
        self._is_lost = not rings
        return rings

    def _look(self) -> list[RingView]:
        self._is_lost = True  # until something was found
        with ThreadPoolExecutor(min(32, len(self._urls))) as threads:
            found = list(threads.map(_read, self._urls))
        if all(each is None for each in found):
            raise HeadraceError(
                f"no Ray node answers at {', '.join(self._urls[:4])}, where metrics were to be: it is gone, or a"
                " firewall is between."
            )
        self._readings.note(self._clock(), [sample for some in found for sample in some or ()])
        rings = self._readings.values(_name(table.RUNNING), "ring")
        return [ring_view(self._readings, ring) for ring in rings]


def _read(url: str) -> list[Sample] | None:
    try:
        with urlopen(f"{url}/metrics", timeout=5.0) as answer:
            return list(parse(answer.read().decode("utf-8", "replace"), _PREFIX))
    except (OSError, ValueError):
        return None


def _name(spec: MetricSpec) -> str:
    return spec.exposed[0]


class _Ring:
    """The readings of one ring."""

    def __init__(self, readings: Readings, ring: str) -> None:
        self._readings, self._ring = readings, ring

    def rate(self, spec: MetricSpec, **labels: str) -> float:
        return self._readings.rate(_name(spec), ring=self._ring, **labels)

    def total(self, spec: MetricSpec, **labels: str) -> int:
        return round(self._readings.total(_name(spec), ring=self._ring, **labels))

    def seconds(self, spec: MetricSpec, **labels: str) -> float:
        return self._readings.total(_name(spec), ring=self._ring, **labels)

    def newest(self, spec: MetricSpec, **labels: str) -> tuple[float, Mapping[str, str]] | None:
        return self._readings.newest(_name(spec), ring=self._ring, **labels)

    def values(self, spec: MetricSpec, label: str, **labels: str) -> list[str]:
        return self._readings.values(_name(spec), label, ring=self._ring, **labels)


def ring_view(readings: Readings, name: str) -> RingView:
    """What metrics say of the ring of that name."""
    ring = _Ring(readings, name)
    busy, passes = ring.rate(table.BUSY_SECONDS), ring.rate(table.PASSES)
    stages = sorted(int(stage) for stage in ring.values(table.STAGE_STATE, "stage"))
    return RingView(
        name=name,
        stages=tuple(_stage(ring, str(stage), busy) for stage in stages),
        running=ring.total(table.RUNNING),
        waiting=ring.total(table.WAITING),
        max_running=ring.total(table.MAX_RUNNING),
        share_of_bound=ring.rate(table.BOUND_SECONDS) / busy if busy else None,
        bound_by=_binds(ring),
        tokens_per_second=ring.rate(table.OUTPUT_TOKENS) / busy if busy else None,
        pass_seconds=busy / passes if passes else None,
        rejected={
            code: count
            for code in ring.values(table.TURNED_AWAY, "code")
            if (count := ring.total(table.TURNED_AWAY, code=code))
        },
        pages=_pages(ring),
        adapter_slots={
            state: ring.total(table.ADAPTER_SLOTS, state=state)
            for state in ring.values(table.ADAPTER_SLOTS, "state")
        },
        adapters_waiting=ring.total(table.ADAPTERS_WAITING),
        recoveries=ring.total(table.RECOVERIES),
        last=_recoveries(ring),
    )


def _binds(ring: _Ring) -> str:
    terms = ring.values(table.PLANNED_PASS_SECONDS, "term")
    planned = {term: ring.seconds(table.PLANNED_PASS_SECONDS, term=term) for term in terms}
    return max(planned, key=planned.__getitem__, default="")


def _stage(ring: _Ring, stage: str, busy: float) -> StageView:
    process, states = ring.newest(table.STAGE_PID, stage=stage), table.STAGE_STATE
    state = [
        state
        for state in ring.values(states, "state", stage=stage)
        if ring.total(states, stage=stage, state=state)
    ]
    return StageView(
        stage=int(stage),
        node="" if process is None else process[1].get("NodeAddress", ""),
        pid=0 if process is None else round(process[0]),
        state=state[0] if state else "",
        parts=_parts(ring, stage, busy),
        rates={} if not busy else _rates(ring, stage, busy),
    )


def _parts(ring: _Ring, stage: str, busy: float) -> dict[str, float] | None:
    """Shares of the busy time. The stage's own process and the driver tell of them at different moments: what the
    stage says is taken as shares of what the driver says that it was not idle."""
    seconds = {part: ring.rate(table.STAGE_SECONDS, stage=stage, part=part) for part in PARTS}
    own = sum(seconds.values()) - seconds["idle"]
    if not busy or not own:
        return None
    idle = min(1.0, seconds["idle"] / busy)
    return {**{part: (1 - idle) * seconds[part] / own for part in PARTS}, "idle": idle}


def _rates(ring: _Ring, stage: str, busy: float) -> dict[str, float]:
    labels = {"stage": stage}
    return {
        name: ring.rate(table.TIER_BYTES, tier=tier, content=content, **labels) / busy
        for name, (tier, content) in _TIERS.items()
    }


def _pages(ring: _Ring) -> dict[str, dict[str, int]]:
    return {
        tier: {
            state: ring.total(table.KV_PAGES, tier=tier, state=state)
            for state in ring.values(table.KV_PAGES, "state", tier=tier)
        }
        for tier in ("device", "host", "nvme")
    }


def _place(phase: str) -> int:
    return _PHASES.index(phase) if phase in _PHASES else len(_PHASES)


def _recoveries(ring: _Ring) -> RecoveryView | None:
    """All of them together: metrics do not tell one from the other."""
    kinds = tuple(kind for kind in KINDS if ring.total(table.RECOVERIES, kind=kind))
    if not kinds:
        return None
    stages = [
        int(stage)
        for stage in ring.values(table.REPLACED_STAGES, "stage")
        if ring.total(table.REPLACED_STAGES, stage=stage)
    ]
    phases = {
        phase: ring.seconds(table.RECOVERY_SECONDS, phase=phase)
        for phase in sorted(ring.values(table.RECOVERY_SECONDS, "phase"), key=_place)
    }
    return RecoveryView(tuple(sorted(stages)), phases, kinds=kinds)
