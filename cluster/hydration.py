"""Stores that nodes fill from a cold tier or from each other: what every node needs first, and layers once
there is a plan."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headrace.cluster.pipeline import gather
from headrace.cluster.processes import START_SECONDS
from headrace.cluster.wire import encode
from headrace.runtime.cold.source import PEERS, ColdModel, Hydration, parse_cold, read_origin
from headrace.runtime.store import Store

log = logging.getLogger(__name__)

SLOWEST_BYTES = 5e6
"""A second, all stages of a run together: a tier that brings less is as good as dead."""


def cold_model(store: Path, cold: str | None) -> ColdModel | None:
    """Where what `store` lacks comes from: what the user said, else where it was pulled from, if it was."""
    if cold is not None:
        return parse_cold(cold, store)
    origin = read_origin(store)
    return None if origin is None or origin.url == PEERS else origin


def open_store(path: Path, cold: ColdModel | None) -> Store:
    """The store with as many blocks as it has; without a cold tier it has to be as Store.open wants it.

    What a driver needs (config, tokenizer, manifest) is fetched where it is not there.
    """
    if cold is None:
        return Store.open(path)
    from headrace.runtime.cold.pull import hydrate

    hydrate(Hydration(str(path), cold))
    return Store.described(path)


def hydrate_stages(
    actors: Sequence[Any],
    store: Store,
    wanted: Sequence[Hydration],
    peers: Sequence[Any] = (),
    *,
    first: int = 0,
    check: Callable[[], None] | None = None,
) -> None:
    """Have each stage fetch what its node lacks, from the cold tier or from `peers`, which are StorePeers.
    `actors[0]` is stage `first`. `check` is called while they are waited for, and may raise."""
    nbytes = sum(_nbytes(store, each) for each in wanted)
    refs = [
        actor.hydrate.remote(encode(each))
        if each.cold is not None
        else actor.receive.remote(encode(each), store.digest, list(peers))
        for actor, each in zip(actors, wanted, strict=True)
    ]
    seconds = START_SECONDS + nbytes / SLOWEST_BYTES
    where = wanted[0].cold or "other nodes"
    doing = f"fetching from {where}"
    fetched = gather(refs, seconds, doing=doing, first=first, check=check)
    log.info("fetched from %s: %d bytes of layers and files", where, sum(fetched))


def _nbytes(store: Store, wanted: Hydration) -> int:
    blocks = store.blocks_of(wanted.layers, first=wanted.first, last=wanted.last)
    return sum(block.nbytes for block in blocks)
