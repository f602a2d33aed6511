"""Starts a ring: processes, what they measure, the plan, the weights, edges. And again, with fewer stages."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Self

from headrace.cluster.adapters import adapter_host_bytes
from headrace.cluster.discovery import Discovery
from headrace.cluster.edges import Edges, meeting_host
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.hydration import cold_model, hydrate_stages
from headrace.cluster.kv_options import log_config, log_keys, log_kv
from headrace.cluster.members import Members
from headrace.cluster.network_speed import NetworkSpeed
from headrace.cluster.peers import Peers
from headrace.cluster.pipeline import RayPipeline, gather
from headrace.cluster.processes import START_SECONDS, StageProcesses, num_places
from headrace.cluster.pulses import Pulses
from headrace.cluster.recovery import RingRecovery
from headrace.cluster.replacement import StageReplacer
from headrace.cluster.ring import Ring
from headrace.cluster.run_plan import budgets, inputs_of_run, stage_device
from headrace.cluster.stage_logs import ActorLogs
from headrace.cluster.start_times import StartTimes, read_at_start
from headrace.cluster.wire import decode, encode
from headrace.runtime.cold.source import ColdModel, Hydration
from headrace.runtime.stage_config import StageConfig
from headrace.runtime.store import Store
from headrace.runtime.streaming.page_cache import ReadAhead
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.inputs import ModelShape
from headrace.scheduler.placement import Plan

log = logging.getLogger(__name__)

Watch = Callable[[Sequence[Any]], None]


@dataclass(frozen=True, slots=True)
class RunModel:
    """A store with what it may lack, the device and the compute type by name, and its sizes in that, when they
    are known."""

    store: Store
    cold: ColdModel | None
    device: str
    dtype: str
    shape: "Future[ModelShape]"


class RingStarter:
    """Owns the ring that runs: it ends when another one is started, or with the block.

    `ahead` reads into the page cache until the first ring has loaded. `watch` is given the stages' actors
    before they load anything, and returns before they do.
    """

    def __init__(
        self,
        options: EngineOptions,
        model: RunModel,
        ahead: ReadAhead,
        times: StartTimes,
        watch: Watch | None = None,
    ) -> None:
        self._options, self._model, self._watch = options, model, watch
        self._ahead, self._times = ahead, times
        self._opened = ExitStack()
        self._peers: Sequence[Any] = ()
        self.name = (
            ""  # what metrics of the ring are told apart by; none where nobody would see them
        )

    def start(self, stages: int) -> Ring:
        """HeadraceError when the cluster has no room for them, or they have none for the model."""
        options, model, times = self._options, self._model, self._times
        if stages != options.stages:  # layers of each stage were told for other ones
            options = replace(options, stages=stages, stage_layers=None)
        pulses = self._opened.enter_context(self._pulses())
        name = model.store.path.name
        processes = StageProcesses(stages, model.device, name, pulses, self.name)
        self.name = processes.ring
        actors = self._opened.enter_context(processes).actors
        if options.from_peers:
            store = model.store
            peers = self._opened.enter_context(Peers(store.path.resolve(), store.digest))
            self._peers = peers.actors
        found = self._discover(actors, pulses.check)
        times.ended("stages")
        inputs = inputs_of_run(options, model.device, found, model.shape.result())
        if options.network_gbps is None and len({*inputs.nodes}) > 1:
            speed = NetworkSpeed(
                meeting_host(options.interface),
                options.rendezvous_port,
                options.interface or "",
                pinned=options.interface is not None,
                device=stage_device(model.device),
                check=pulses.check,
            )
            inputs = replace(inputs, links=speed.links(inputs.links, actors, inputs.nodes))
            times.ended("network")
        plan = inputs.plan()
        times.ended("plan")
        logs = None
        if plan.nvme_pages:
            logs = ActorLogs(actors)
            self._opened.callback(logs.close)
        log_kv(plan, options.kv_hot_window)
        if self._watch is not None:
            self._watch(actors)
        configs = self._configs(plan, options, found)
        keys = log_keys(configs[0].kv_log)
        _load(actors, configs, model.store, keys, self._peers, pulses.check)
        self._ahead.close()
        times.ended(f"loading {read_at_start(plan)} and models' code")
        edges = self._connect(actors, pulses.check)
        times.ended("connecting")
        pipeline = RayPipeline(actors, plan, options.pass_timeout, pulses.check)
        members = Members(processes, configs, pipeline, logs, edges, keys, self._peers)
        replacer, recovery = StageReplacer(members), RingRecovery(members)
        return Ring(plan, pipeline, logs, replacer, recovery, inputs, pipeline.traces)

    def start_smaller(self) -> Ring:
        """End what is left of the ring, and start one on as many stages as the cluster has places for now.

        HeadraceError as for `start`, and where it has none.
        """
        self.close()
        stages = min(self._options.stages - 1, num_places(self._model.device))
        if stages < 1:
            raise HeadraceError(
                "no node of the Ray cluster is left that could have a stage: add some, and start again"
            )
        return self.start(stages)

    def _discover(self, actors: Sequence[Any], check: Callable[[], None]) -> list[Discovery]:
        """One after the other, when all are there: stages of one machine would measure each other."""
        device, model = stage_device(self._model.device), self._model
        opening = [actor.open.remote(device) for actor in actors]
        gather(opening, START_SECONDS, doing="starting", check=check)
        path = str(model.store.path.resolve())
        if model.cold is not None or self._peers:
            wanted = [Hydration(path, model.cold)] * len(actors)
            hydrate_stages(actors, model.store, wanted, self._peers, check=check)
        found = []
        with self._ahead.paused():
            for i, actor in enumerate(actors):
                asked = actor.discover.remote(device, path)
                doing = "measuring the machine"
                done = gather([asked], START_SECONDS, doing=doing, first=i, check=check)
                found.append(decode(done[0], Discovery))
        return found

    def _configs(
        self, plan: Plan, options: EngineOptions, found: Sequence[Discovery]
    ) -> list[StageConfig]:
        shared = Counter(discovery.node for discovery in found)
        memory = [budget.device_memory for budget in budgets(options, self._model.device, found)]
        return [
            StageConfig(
                store=str(options.store.resolve()),
                stage=i,
                plan=plan,
                device=stage_device(self._model.device),
                device_memory=memory[i],
                dtype=self._model.dtype,
                storage=options.storage,
                deadline=options.pass_timeout,
                threads=max(1, discovery.cores // shared[discovery.node]),
                trace=options.trace is not None,
                kv_log=log_config(options),
                cold=cold_model(options.store, options.cold),
                adapter_host_memory=adapter_host_bytes(options),
                from_peers=options.from_peers,
                fp8_products=options.fp8_products,
            )
            for i, discovery in enumerate(found)
        ]

    def _pulses(self) -> Pulses:
        options = self._options
        host = meeting_host(options.interface, local=options.address is None)
        # Stages find each other at the port that the user gave, whenever they do: this one is taken for longer.
        port = options.rendezvous_port and options.rendezvous_port + 1
        return Pulses(host, port, options.heartbeat_timeout)

    def _connect(self, actors: Sequence[Any], check: Callable[[], None]) -> Edges:
        options = self._options
        edges = Edges(
            local=options.address is None,
            interface=options.interface,
            port=options.rendezvous_port,
            check=check,
        )
        self._opened.callback(edges.close)
        edges.connect(actors)
        return edges

    def close(self) -> None:
        """End the ring that runs, if one does."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _load(
    actors: Sequence[Any],
    configs: Sequence[StageConfig],
    store: Store,
    keys: Mapping[str, bytes],
    peers: Sequence[Any],
    check: Callable[[], None],
) -> None:
    wanted = [config.hydration for config in configs if config.hydration is not None]
    if wanted:
        hydrate_stages(actors, store, wanted, peers, check=check)
    refs = [
        actor.load.remote(encode(config), keys=dict(keys))
        for actor, config in zip(actors, configs, strict=True)
    ]
    deadline = configs[0].deadline
    deadline = max(deadline, START_SECONDS)
    names = gather(refs, deadline, doing="loading weights", check=check)
    log.info("storage: %s", names)
