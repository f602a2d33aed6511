"""The processes of a run on Ray: the cluster, if it is the run's own, and one actor a stage."""

import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self
from uuid import uuid4

import ray
from ray._private.state import actors, available_resources_per_node
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from headrace.cluster.pulses import Pulses
from headrace.cluster.stage_actor import CONCURRENCY, StageActor
from headrace.cluster.telemetry.ray_sink import has_agent
from headrace.scheduler.errors import HeadraceError, NoPlaceError

START_SECONDS = 180.0
"""How long stage processes may take to start; loading weights has its own, longer deadline."""

_GROUPS = "headrace"

_named: Counter[str] = Counter()  # how many actors were given each name

PLACE_SECONDS = 60.0
"""How long a cluster may take to have another place for stages whose node is gone."""

CLOSE_SECONDS = 10.0
"""How long Ray may take to let go of stages."""


@contextmanager
def ray_cluster(
    stages: int, address: str | None, metrics_port: int | None = None
) -> Iterator[None]:
    """A Ray connection for the engine's life: its own cluster unless an address is given.

    Its own cluster shows metrics at `metrics_port`, else at a port that Ray chooses.

    Ray (2.60 and later) turns token authentication on for a cluster that it starts itself.
    """
    if ray.is_initialized():  # the caller's own connection: use it and leave it
        if metrics_port is not None:
            raise HeadraceError(
                "metrics_port is for a cluster of the run's own, and this process has a connection to"
                " one already, which has its port: leave it out"
            )
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would point the workers of a driver started by `uv run` at a fresh environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # By default Ray's workers yield to all else on a machine (nice 15): a pass would wait for a core
    # each time that it launches a kernel.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Every call of a stage is looked at; Ray would print those that failed, too.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    arguments: dict[str, Any] = {"address": address}
    if address is not None:
        _knock(address)
    else:
        # Ray starts a worker for each of its CPUs at once; more than the stages would be idle.
        arguments = {"address": "local", "num_cpus": stages, "include_dashboard": False}
        if metrics_port is not None:
            _check_free(metrics_port)
            arguments["_metrics_export_port"] = metrics_port
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
    except Exception as error:  # Ray raises that, too, when it does not start in time
        if address is None:
            raise HeadraceError(
                f"Ray did not start on this machine: {error}. Is it out of memory, disk in /tmp or "
                "processor time? Try again, or give the --address of a running cluster"
            ) from error
        raise HeadraceError(
            f"cannot join the Ray cluster at {address}: {error}. Start it with `ray start "
            "--head`, check the address and, if the cluster has a token, that RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH are set here, or leave --address out to run on this machine alone"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_free(port: int) -> None:
    """HeadraceError when a port is taken: Ray would go on without a word, and without metrics."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise HeadraceError(
                f"--metrics-port {port} cannot be had: {error.strerror}. Choose another one"
            ) from error


def _knock(address: str) -> None:
    """HeadraceError when nothing listens at "host:port", for which Ray would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10.0).close()
    except OSError as error:
        raise HeadraceError(
            f"cannot reach --address {address}: {error.strerror or error}. Is the cluster up (ray "
            "status), and is this its GCS port (6379 by default)?"
        ) from error


class StageProcesses:
    """One actor a stage, each in its bundle of a placement group or on a node that was chosen for it."""

    def __init__(
        self, stages: int, device: str, model: str, pulses: Pulses, ring: str = ""
    ) -> None:
        """HeadraceError when the Ray cluster cannot have so many. They beat for `pulses`. `ring` is what metrics
        of them are told apart by, if they take the place of others."""
        self._bundle: dict[str, float] = {"CPU": 1.0}
        if device == "cuda":
            self._bundle["GPU"] = 1.0
        self._stages, self.pulses = stages, pulses
        # What metrics of these processes are told apart by; "" where nobody would see them.
        self.ring = ring or (f"{model}-{uuid4().hex[:6]}" if has_agent() else "")
        self._label = self.ring or f"{model}-{uuid4().hex[:6]}"
        self._check_resources()
        self._group = placement_group([self._bundle] * stages, strategy="PACK", name=_group_name())
        self._nodes: dict[int, str] = {}  # of stages that are not in their bundles
        self._all: dict[Any, str] = {}  # actors that are there, with the names of their pulses
        self.actors: list[Any] = []
        try:
            if not self._group.wait(START_SECONDS):
                raise HeadraceError(
                    f"Ray could not reserve {stages} x {self._bundle} within {START_SECONDS:.0f} s: "
                    "another job holds them; wait for it or lower --stages"
                )
            self.actors += [self.start(stage) for stage in range(stages)]
        except BaseException:
            self.close()
            raise

    def _check_resources(self) -> None:
        total = ray.cluster_resources()
        for resource, amount in self._bundle.items():
            if total.get(resource, 0) < amount * self._stages:
                raise HeadraceError(
                    f"{self._stages} stages need {self._stages} {resource}s and the Ray cluster "
                    f"has {total.get(resource, 0):.0f}: lower --stages or add machines"
                )

    def in_bundle(self, stage: int) -> bool:
        """Whether the stage's actor takes the bundle that was reserved for it."""
        return stage not in self._nodes

    def node_of(self, stage: int) -> str:
        """The id of the node where the stage's actor is."""
        return self._nodes.get(stage) or self.bundle_node(stage)

    def bundle_node(self, stage: int) -> str:
        """The id of the node where the stage's bundle is."""
        return str(placement_group_table(self._group)["bundles_to_node_id"][stage])

    def spare_node(self, other_than: str) -> str | None:
        """The id of another node that has room for one more stage; None where none has."""
        for node, free in sorted(available_resources_per_node().items()):
            if node != other_than and all(
                free.get(name, 0.0) >= amount for name, amount in self._bundle.items()
            ):
                return str(node)
        return None

    def await_places(self) -> None:
        """Return when every bundle is on a node that lives. NoPlaceError when one is on none for too long.

        Ray moves bundles of a node that died to others that have room, as soon as it knows.
        """
        end = time.monotonic() + PLACE_SECONDS
        while (state := placement_group_table(self._group)["state"]) != "CREATED":
            if time.monotonic() > end:
                raise NoPlaceError(
                    f"a node of the Ray cluster is gone, and no other has room for its stages since"
                    f" {PLACE_SECONDS:.0f} s (their placement group is {state.lower()})"
                )
            time.sleep(0.2)

    def pid_of(self, stage: int) -> int:
        """The process id of the stage's actor, on its node; 0 while it starts."""
        found = actors(actor_id=self.actors[stage]._actor_id.hex())
        return int(found.get("Pid") or 0)

    def place_of(self, stage: int) -> tuple[str, int]:
        """The address of the node where the stage's actor is and its process id there; "" and 0 while it
        starts. Any thread may ask."""
        found = actors(actor_id=self.actors[stage]._actor_id.hex())
        address = found.get("Address") or {}
        return str(address.get("IPAddress") or ""), int(found.get("Pid") or 0)

    def start(self, stage: int, node: str | None = None) -> Any:
        """A new actor for the stage, in its bundle or on the node with that id."""
        strategy: Any = PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=stage
        )
        if node is not None:
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        name = f"stage {stage} of {self._stages}, {self._label}"  # numbered as in every message
        remote, pulse = (
            ray.remote(concurrency_groups=CONCURRENCY)(StageActor),
            self.pulses.expect(stage),
        )
        actor = remote.options(
            name=_unused(f"headrace {self._label} stage {stage} of {self._stages}"),
            num_cpus=self._bundle["CPU"],
            num_gpus=self._bundle.get("GPU", 0),
            max_restarts=0,
            scheduling_strategy=strategy,
        ).remote(name, self.ring, pulse)
        self._all[actor] = pulse.name
        return actor

    def stop(self, actor: Any) -> None:
        """Again is nothing: a stage may be found dead whose process had to go before another one came."""
        if (pulse := self._all.pop(actor, None)) is not None:
            self.pulses.forget(pulse)
            ray.kill(actor)

    def replace(self, stage: int, actor: Any, node: str | None) -> None:
        """The stage's actor is another one from now on, in its bundle or on that node."""
        self.actors[stage] = actor
        self._nodes.pop(stage, None)
        if node is not None:
            self._nodes[stage] = node

    def close(self) -> None:
        """Where Ray itself is gone, as after a SIGTERM to the whole process group, it would be asked in
        vain for minutes: then its resources are, too."""
        closing = threading.Thread(target=self._close, daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)

    def _close(self) -> None:
        while self._all:
            self.stop(next(iter(self._all)))
        remove_placement_group(self._group)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def num_places(device: str) -> int:
    """How many stages the Ray cluster could have on the nodes that live, if it had nothing else."""
    wanted = ("CPU", "GPU") if device == "cuda" else ("CPU",)
    living = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(resources.get(name, 0)) for name in wanted) for resources in living)


def _unused(name: str) -> str:
    """An actor's name that none of this process's has had. Ray wants them unique, and one that was killed has its
    for a while longer."""
    _named[name] += 1
    return name if _named[name] == 1 else f"{name}, process {_named[name]}"


def _group_name() -> str:
    """A placement group's, with the actor in it that this process is, if it is one."""
    return f"{_GROUPS} {ray.get_runtime_context().get_actor_id()} {uuid4().hex}"


def remove_left_groups() -> None:
    """Remove what killed actors had reserved. Called by an actor before it reserves anything itself.

    Stages end with the actor that drives them, but their placement group only with the whole job, and Ray
    starts a killed actor again under its id.
    """
    own = ray.get_runtime_context().get_actor_id()
    for group in placement_group_table().values():
        kind, _, rest = group["name"].partition(" ")
        actor = rest.partition(" ")[0]
        if kind != _GROUPS or actor == "None" or group["state"] == "REMOVED":
            continue
        if actor == own or actors(actor_id=actor).get("State") == "DEAD":
            with suppress(ValueError):  # another one removed it, or it is of another namespace
                remove_placement_group(get_placement_group(group["name"]))


def find_node(name: str) -> str:
    """The id of the node of that id, host name or address. HeadraceError when there is not just one."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    keys = ("NodeID", "NodeManagerHostname", "NodeManagerAddress")
    found = [node["NodeID"] for node in alive if name in (node[key] for key in keys)]
    if len(found) != 1:
        there = ", ".join(f"{node[keys[1]]} ({node[keys[2]]}, {node[keys[0]]})" for node in alive)
        raise HeadraceError(
            f"{len(found)} nodes of the Ray cluster are {name}: name one by its id. There are {there}"
        )
    return str(found[0])
