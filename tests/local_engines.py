"""Engines with their real tokenizer over rings inside this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rings import local_ring, manual_plan

from headrace.cluster.engine import Engine
from headrace.cluster.ring import Ring
from headrace.cluster.tokenizer import load_tokenizer, stop_ids
from headrace.runtime.store import Store


@contextmanager
def engine_of(store: Path, ring: dict[str, Any]) -> Iterator[Engine]:
    """On a ring inside this process."""
    opened, tokenizer = Store.open(store), load_tokenizer(store)
    plan, ends = manual_plan(opened, **ring), stop_ids(opened, tokenizer)
    with (
        local_ring(store, plan) as pipeline,
        Engine(
            Ring(plan, pipeline, traces=pipeline),
            tokenizer,
            stop_ids=ends,
            digest="",
            dtype="float32",
        ) as engine,
    ):
        yield engine
