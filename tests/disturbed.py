"""Answers of an engine whose stages are disturbed while it generates them."""

from collections.abc import Callable
from typing import Any

from kv_runs import prompt

from headrace.cluster.engine import Engine
from headrace.scheduler.request import SamplingParams

PROMPTS = [prompt(i, 60 + 25 * i) for i in range(8)]
NEW = 40
PARAMS = [SamplingParams(temperature=t, max_tokens=NEW, ignore_eos=True) for t in (0.0, 0.9)]


def answers(
    engine: Engine, tenant: str, disturb: Callable[[int], None] = lambda passes: None
) -> list[Any]:
    """Of all prompts at once; `disturb` is told before each step how many passes have returned."""
    done: dict[int, Any] = {}
    ids = [
        engine.add(tokens, PARAMS[i % 2], seed=i, tenant=tenant) for i, tokens in enumerate(PROMPTS)
    ]
    before = engine.stats.passes
    while engine.has_work:
        disturb(engine.stats.passes - before)
        done |= {completion.request_id: completion.token_ids for completion in engine.step()}
    return [done[request_id] for request_id in ids]
