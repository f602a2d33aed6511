"""Stages that die or hang while requests are under way: others take their place, and no token changes."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from kv_runs import prompt, wide_llama
from ray_engines import ray_engine
from rings import manual_plan

from headrace.cluster.engine import Engine
from headrace.runtime.store import Store
from headrace.scheduler.placement import Plan, Tier
from headrace.scheduler.request import SamplingParams

PROMPTS = [prompt(i, 60 + 25 * i) for i in range(8)]
NEW = 40
PARAMS = [SamplingParams(temperature=t, max_tokens=NEW, ignore_eos=True) for t in (0.0, 0.9)]


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_llama(tmp_path_factory.mktemp("llama"))


def plan_of(store: Path, **room: Any) -> Plan:
    given: dict[str, Any] = {
        "stages": 3,
        "tier": Tier.DEVICE,
        "num_pages": 24,
        "max_sequences": 6,
        "token_budget": 100,
        "ahead": 1,
    }
    return manual_plan(Store.open(store), **(given | room))


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


def test_a_stage_that_is_killed_is_replaced_and_no_other_is(llama: Path) -> None:
    with ray_engine(llama, plan_of(llama)) as engine:
        want = answers(engine, "a")
        before = engine.stage_pids()

        def disturb(passes: int) -> None:
            if passes == 10 and not engine.stats.num_recoveries:
                os.kill(before[1], signal.SIGKILL)

        assert answers(engine, "b", disturb) == want
        after = engine.stage_pids()
        assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
        [recovery] = engine.stats.recoveries
        assert recovery.stages == (1,) and recovery.rounds == 1 and recovery.requests > 0
        assert "stage 1 died" in str(recovery)
