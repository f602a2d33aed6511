"""An engine that an actor of a Ray cluster drives: its stages run on that cluster, beside it or elsewhere."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from headrace.cluster.engine import Engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.keyword_options import engine_options
from headrace.cluster.launch import running_engine
from headrace.cluster.processes import remove_left_groups
from headrace.scheduler.errors import HeadraceError


def actor_options(store: str | Path, keywords: Mapping[str, Any]) -> EngineOptions:
    """EngineOptions for an actor that is still to be made. The store is at this path on every node.

    HeadraceError as by `engine_options`, and for an `address`: the actor has a cluster.
    """
    if keywords.get("address") is not None:
        raise HeadraceError("address: stages run on the cluster of the application, leave it out")
    return engine_options(Path(store).absolute(), {**keywords, "address": "auto"})


@contextmanager
def actor_engine(options: EngineOptions) -> Iterator[Engine]:
    """`running_engine` inside an actor, over the connection that it has. The actor itself needs no GPU, so that
    it is the cluster which says whether there are any."""
    remove_left_groups()
    if options.device == "auto":
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        options = replace(options, device="cuda" if has_gpus else "cpu")
    with running_engine(options) as engine:
        yield engine
