"""The processes of a run on Ray: the cluster, if it is the run's own, and one actor a stage."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from headrace.cluster.stage_actor import CONCURRENCY, StageActor
from headrace.scheduler.errors import HeadraceError

START_SECONDS = 180.0
"""How long stage processes may take to start; loading weights has its own, longer deadline."""


@contextmanager
def ray_cluster(stages: int, address: str | None) -> Iterator[None]:
    """A Ray connection for the engine's life: its own cluster unless an address is given.

    Ray (2.60 and later) turns token authentication on for a cluster that it starts itself.
    """
    if ray.is_initialized():  # the caller's own connection: use it and leave it
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would point the workers of a driver started by `uv run` at a fresh environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    arguments: dict[str, Any] = {"address": address}
    if address is not None:
        _knock(address)
    else:
        # Ray starts a worker for each of its CPUs at once; more than the stages would be idle.
        arguments = {"address": "local", "num_cpus": stages, "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        if address is None:
            raise HeadraceError(
                f"Ray did not start on this machine: {error}. Is it out of memory, disk in /tmp or "
                "processor time? Try again, or give the --address of a running cluster"
            ) from error
        raise HeadraceError(
            f"cannot join the Ray cluster at {address}: {error}. Start it with `ray start "
            "--head`, check the address, or leave --address out to run on this machine alone"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


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


@contextmanager
def stage_actors(stages: int, device: str, model: str) -> Iterator[list[Any]]:
    """One actor a stage in a placement group, one GPU each on CUDA; all gone at the end."""
    bundle: dict[str, float] = {"CPU": 1.0}
    if device == "cuda":
        bundle["GPU"] = 1.0
    total = ray.cluster_resources()
    for resource, amount in bundle.items():
        if total.get(resource, 0) < amount * stages:
            raise HeadraceError(
                f"{stages} stages need {stages} {resource}s and the Ray cluster "
                f"has {total.get(resource, 0):.0f}: lower --stages or add machines"
            )
    group = placement_group([bundle] * stages, strategy="PACK")
    actors: list[Any] = []
    try:
        if not group.wait(START_SECONDS):
            raise HeadraceError(
                f"Ray could not reserve {stages} x {bundle} within {START_SECONDS:.0f} s: "
                "another job holds them; wait for it or lower --stages"
            )
        remote = ray.remote(concurrency_groups=CONCURRENCY)(StageActor)
        for i in range(stages):
            name = f"stage {i} of {stages}, {model}"  # numbered as in every message
            actors.append(
                remote.options(
                    num_cpus=1,
                    num_gpus=bundle.get("GPU", 0),
                    max_restarts=0,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        group, placement_group_bundle_index=i
                    ),
                ).remote(name)
            )
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)
