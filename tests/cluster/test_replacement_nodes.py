"""A stage that moves to another node: its pages go there through Ray, and its log stays behind."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from kv_runs import CAP, answers, prompt, wide_llama
from ray.cluster_utils import Cluster
from ray_engines import ray_engine
from rings import manual_plan

from headrace.runtime.stage_config import LogConfig
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.placement import Tier

PROMPTS = [prompt(i, 60 + 25 * i) for i in range(8)]
NEW = 40

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """A cluster with room for two stages, and a node with room for one more."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield [cluster.head_node.node_id, cluster.add_node(num_cpus=1).node_id]
    finally:
        ray.shutdown()
        cluster.shutdown()


def where(actor: Any) -> str:
    asked = actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
    return str(ray.get(asked))


def test_a_node_is_taken_out_of_service(nodes: list[str], tmp_path: Path) -> None:
    store = wide_llama(tmp_path)
    plan = manual_plan(
        Store.open(store),
        stages=2,
        tier=Tier.DEVICE,
        num_pages=12,
        max_sequences=4,
        token_budget=100,
        host_pages=8,
        nvme_pages=500,
    )
    with ray_engine(store, plan, LogConfig(str(tmp_path / "kv"), CAP)) as engine:
        ring: Any = engine._pipeline._pipeline  # type: ignore[attr-defined]
        want = answers(engine, PROMPTS, NEW, keep=True)
        assert engine.stats.kv.nvme
        done = engine.replace_stage(1, nodes[1])
        assert done.pages and not done.lost and not engine.stats.kv.nvme
        assert [where(actor) for actor in ring._actors] == nodes
        computed = ring.computed
        assert answers(engine, PROMPTS, NEW, keep=True) == want
        assert engine.stats.kv.nvme and engine.stats.kv.hits.total
        assert not any(engine.stats.kv.lost.values())
        assert ring.computed < 2 * computed
        with pytest.raises(HeadraceError, match="no CPU to spare"):
            engine.replace_stage(0, nodes[1])
        assert engine.replace_stage(1).pages
        assert answers(engine, PROMPTS, NEW) == want
    assert not any((tmp_path / "kv").iterdir())
