"""Engines over stages that are Ray actors, with plans that tests dictate."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kv_runs import NoText

from headrace.cluster.edges import Edges
from headrace.cluster.engine import Engine
from headrace.cluster.hydration import hydrate_stages
from headrace.cluster.kv_options import log_keys
from headrace.cluster.members import Members
from headrace.cluster.pipeline import Pending, RayPipeline, gather
from headrace.cluster.processes import StageProcesses
from headrace.cluster.pulses import Pulses
from headrace.cluster.recovery import RingRecovery
from headrace.cluster.replacement import StageReplacer
from headrace.cluster.ring import Ring
from headrace.cluster.stage_logs import ActorLogs
from headrace.cluster.wire import encode
from headrace.runtime.cold.source import ColdModel
from headrace.runtime.stage_config import LogConfig, StageConfig
from headrace.runtime.store import Store
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan import Pass


class Counted(RayPipeline):
    """Counts the tokens that stages compute."""

    computed = 0

    def submit(self, a_pass: Pass) -> Pending:
        self.computed += a_pass.num_tokens
        return super().submit(a_pass)


@contextmanager
def ray_engine(
    store: Path,
    plan: Plan,
    kv_log: LogConfig | None = None,
    *,
    recovers: bool = True,
    write_through: bool = False,
    deadline: float = 60.0,
    patience: float = 30.0,
    own_stores: Sequence[Path] | None = None,
    cold: ColdModel | None = None,
    peers: Sequence[Any] = (),
) -> Iterator[Engine]:
    """As running_engine, with a plan that a test dictates; stages may have stores of their own, and fetch what
    they lack from `peers`, actors that are StorePeers."""
    stages = plan.placement.num_stages
    configs = [
        StageConfig(
            store=str(store if own_stores is None else own_stores[stage]),
            stage=stage,
            plan=plan,
            device="cpu",
            device_memory=0,
            dtype="float32",
            storage="buffered",
            deadline=deadline,
            threads=1,
            kv_log=kv_log,
            cold=cold,
            from_peers=bool(peers),
        )
        for stage in range(stages)
    ]
    with ExitStack() as stack:
        pulses = stack.enter_context(Pulses("127.0.0.1", 0, patience))
        processes = stack.enter_context(StageProcesses(stages, "cpu", store.name, pulses))
        actors = processes.actors
        gather([actor.open.remote("cpu") for actor in actors], 60.0, doing="starting")
        keys = log_keys(kv_log)
        wanted = [config.hydration for config in configs if config.hydration is not None]
        if wanted:
            hydrate_stages(actors, Store.open(store), wanted, peers)
        loading = [
            a.load.remote(encode(c), keys=keys) for a, c in zip(actors, configs, strict=True)
        ]
        gather(loading, 60.0, doing="loading")
        edges = Edges(local=True, check=pulses.check)
        stack.callback(edges.close)
        edges.connect(actors)
        logs = ActorLogs(actors) if kv_log else None
        ring = Counted(actors, plan, deadline, pulses.check)
        members = Members(processes, configs, ring, logs, edges, keys, peers)
        engine = Engine(
            Ring(
                plan,
                ring,
                logs,
                StageReplacer(members),
                RingRecovery(members) if recovers else None,
            ),
            NoText(),
            stop_ids=frozenset(),
            digest=Store.open(store).digest,
            dtype="float32",
            write_through=write_through,
        )
        yield stack.enter_context(engine)
