"""The processes that are a ring's stages, in all that knows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from headrace.cluster.edges import Edges
from headrace.cluster.hydration import hydrate_stages
from headrace.cluster.pipeline import RayPipeline, gather
from headrace.cluster.processes import START_SECONDS, StageProcesses
from headrace.cluster.stage_logs import ActorLogs
from headrace.cluster.wire import encode
from headrace.runtime.stage_config import StageConfig
from headrace.runtime.store import Store


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stage's process is: the address of its node, and its id there; "" and 0 while it starts."""

    node: str
    pid: int


class Members:
    """Seats processes as stages. `keys` are of the stages' logs of KV pages, where they are in no file;
    `peers` are StorePeers, where stages fetch from these."""

    def __init__(
        self,
        processes: StageProcesses,
        configs: Sequence[StageConfig],
        pipeline: RayPipeline,
        logs: ActorLogs | None,
        edges: Edges,
        keys: Mapping[str, bytes],
        peers: Sequence[Any] = (),
    ) -> None:
        self.processes, self.configs = processes, configs
        self._pipeline, self._logs, self._edges, self._keys = pipeline, logs, edges, dict(keys)
        self._peers = peers
        self._deadline = max(configs[0].deadline, START_SECONDS)

    def pids(self) -> list[int]:
        """Of the stages' processes, on the node where each is."""
        return [self.processes.pid_of(stage) for stage in range(len(self.configs))]

    @property
    def ring(self) -> str:
        """What metrics of these stages are told apart by; "" where there are none."""
        return self.processes.ring

    def place(self, stage: int) -> Place:
        """Any thread may ask."""
        return Place(*self.processes.place_of(stage))

    def ask(self, stage: int, ref: Any, doing: str, deadline: float | None = None) -> Any:
        """What a call of a stage's returned. StageLostError when it died, fell silent, or did not answer."""
        check = partial(self.processes.pulses.check, stage)
        return gather([ref], deadline or self._deadline, doing=doing, first=stage, check=check)[0]

    def open(self, stage: int, actor: Any, doing: str) -> None:
        """Return when a new process is there, has imported what it runs, and has its device."""
        opening = actor.open.remote(self.configs[stage].device)
        self.ask(stage, opening, f"{doing}: starting in another process", START_SECONDS)

    def load(self, stage: int, actor: Any, step: int, doing: str) -> None:
        """Have a new process read the stage's layers, to run passes from `step` on."""
        config = self.configs[stage]
        if config.hydration is not None:
            store = Store.described(config.store)
            check = partial(self.processes.pulses.check, stage)
            hydrate_stages(
                [actor], store, [config.hydration], self._peers, first=stage, check=check
            )
        self.ask(stage, actor.load.remote(encode(config), step), f"{doing}: loading weights")

    def seat(self, stage: int, actor: Any, node: str | None) -> None:
        """The stage's process is another one from now on, in its bundle or on that node."""
        self.processes.replace(stage, actor, node)
        self._pipeline.replace(stage, actor)
        if self._logs is not None:
            self._logs.replace(stage, actor)

    def leave_trace(self, stage: int) -> None:
        """Keep what the stage's process recorded, if it did, before another one takes its place."""
        self._pipeline.traces.leave(stage)

    def leave_log(self, stage: int) -> None:
        """Note what the stage's log has done, before another process goes on with it."""
        if self._logs is not None:
            self._logs.leave(stage)

    def open_log(self, stage: int, keys: Mapping[str, bytes] | None = None) -> None:
        """Have the stage's process go on with its log, under `keys` or those that all stages began with."""
        if self._logs is not None:
            given = self._keys if keys is None else dict(keys)
            ref = self.processes.actors[stage].open_log.remote(given)
            self.ask(stage, ref, f"stage {stage}: opening its log of KV pages")

    def check(self) -> None:
        """StageLostError with the stages that have not been heard of while this was asked."""
        self.processes.pulses.check()

    def connect(self) -> None:
        """Open all edges anew. StageError when a stage dies or does not answer."""
        self._edges.connect(self.processes.actors)
