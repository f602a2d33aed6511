"""A ring as it is watched, wherever that is known from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from headrace.cluster.recovered import REPLACED

PARTS = ("compute", "weights", "kv", "link", "idle")
"""Where a stage's time goes: computing, waits for weights, KV pages and other stages, and no pass."""

WAITS = PARTS[1:]


@dataclass(frozen=True, slots=True)
class StageView:
    """One stage. What is not known of its process is "" or 0; `seconds` are those in its state.

    `parts` are shares of the time in which the ring had passes under way, which add up to 1; None before the first
    pass, and while there can be none. `rates` are bytes a second of that time, by tier.
    """

    stage: int
    node: str = ""
    pid: int = 0
    state: str = ""
    seconds: float | None = None
    parts: Mapping[str, float] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def longest_wait(self) -> tuple[str, float] | None:
        """What the stage waits for most, and for what share of the time."""
        if self.parts is None:
            return None
        wait = max(WAITS, key=lambda part: self.parts[part] if self.parts else 0.0)
        return wait, self.parts[wait]


@dataclass(frozen=True, slots=True)
class RecoveryView:
    """The last recovery, or all of them where no single one is known (`seconds_ago` is None then). Without `stages`
    none was replaced: `kinds` say what was done."""

    stages: tuple[int, ...]
    phases: Mapping[str, float]
    seconds_ago: float | None = None
    requests: int | None = None
    cause: str = ""
    kinds: tuple[str, ...] = (REPLACED,)

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


@dataclass(frozen=True, slots=True)
class RingView:
    """One ring. Rates are of the last seconds in which it had work; None where it had none, or too little to tell.

    `since_pass` is how long ago the last pass returned, None where that is not known; `pages` are by tier and state,
    `adapter_slots` by state; `adapters_waiting` are those that no slot can be had for.
    While a stage is being replaced no pass is under way, and nothing goes anywhere.
    """

    name: str
    stages: tuple[StageView, ...]
    running: int = 0
    waiting: int = 0
    max_running: int = 0
    share_of_bound: float | None = None
    bound_by: str = ""
    tokens_per_second: float | None = None
    pass_seconds: float | None = None
    since_pass: float | None = None
    rejected: Mapping[str, int] = field(default_factory=dict)
    pages: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    adapter_slots: Mapping[str, int] = field(default_factory=dict)
    adapters_waiting: int = 0
    recoveries: int = 0
    last: RecoveryView | None = None

    @property
    def troubled(self) -> list[StageView]:
        """The stages that do not serve, or wait until others do."""
        return [each for each in self.stages if each.state not in ("", "serving")]

    @property
    def bubble(self) -> float | None:
        """The share of the stages' time in which they had no pass, or waited for each other."""
        parts = [stage.parts for stage in self.stages if stage.parts is not None]
        if not parts:
            return None
        return sum(each["link"] + each["idle"] for each in parts) / len(parts)


class Source(Protocol):
    """Where views come from."""

    @property
    def place(self) -> str:
        """What is watched, for people."""

    @property
    def warm_up(self) -> float:
        """Seconds of `look` each second until rates are known."""

    def look(self) -> list[RingView]:
        """All rings there are. HeadraceError when it cannot be known."""
