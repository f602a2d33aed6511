"""Nodes that go with all that is on them: their stages start again elsewhere."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from disturbed import answers
from kv_runs import wide_llama
from ray.cluster_utils import Cluster
from ray_engines import ray_engine
from rings import manual_plan

from headrace.cluster import processes
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.launch import running_engine
from headrace.runtime.store import Store
from headrace.scheduler.placement import Tier

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Three nodes with room for so many stages each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cpus = {"num_cpus": request.param}
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False} | cpus)
    for _ in range(2):
        cluster.add_node(**cpus)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_a_node_dies(cluster: Cluster, tmp_path: Path) -> None:
    store = wide_llama(tmp_path)
    room: Any = {"num_pages": 24, "max_sequences": 6, "token_budget": 100}
    plan = manual_plan(Store.open(store), stages=3, tier=Tier.DEVICE, **room)
    with ray_engine(store, plan) as engine:
        want = answers(engine, "a")
        members: Any = engine._recovery._members  # type: ignore[union-attr]
        used = [members.processes.node_of(stage) for stage in range(3)]
        victim = next(node for node in cluster.worker_nodes if node.node_id in used)

        def disturb(passes: int) -> None:
            if passes == 10 and victim in cluster.worker_nodes:
                cluster.remove_node(victim, allow_graceful=False)

        assert answers(engine, "b", disturb) == want
        gone = {stage for stage, node in enumerate(used) if node == victim.node_id}
        assert {*engine.stats.recoveries[-1].stages} >= gone
        assert victim.node_id not in {members.processes.node_of(stage) for stage in range(3)}


@pytest.mark.timeout(300)  # two rings start, and Ray misses a node only after some time
@pytest.mark.parametrize("cluster", [1], indirect=True)
def test_a_node_dies_and_there_is_no_other(
    cluster: Cluster, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PLACE_SECONDS", 5.0)
    options = EngineOptions(stories, stages=3, device="cpu", device_memory=64 << 20, context=512)
    with running_engine(options) as engine:
        assert engine.inputs is not None
        assert len({*engine.inputs.nodes}) == 3  # which all have this machine's name
        want = answers(engine, "a")

        def disturb(passes: int) -> None:
            if passes == 10 and victim in cluster.worker_nodes:
                cluster.remove_node(victim, allow_graceful=False)

        victim = next(iter(cluster.worker_nodes))
        assert answers(engine, "b", disturb) == want
        assert engine.plan.placement.num_stages == len(engine.stage_pids()) == 2
        assert answers(engine, "c") == want
        assert [done.replanned for done in engine.stats.recoveries] == [2]
        assert engine.events.recoveries == {"replanned": 1} and not engine.events.replaced_stages


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_a_place_where_every_process_dies_is_left(cluster: Cluster, tmp_path: Path) -> None:
    """As where a GPU is broken: the node lives and has room, and what starts there ends."""
    store = wide_llama(tmp_path)
    room: Any = {"num_pages": 24, "max_sequences": 6, "token_budget": 100}
    plan = manual_plan(Store.open(store), stages=3, tier=Tier.DEVICE, **room)
    with ray_engine(store, plan) as engine, deadly() as kill_new:
        want = answers(engine, "a")
        members: Any = engine._recovery._members  # type: ignore[union-attr]
        places = members.processes
        before = engine.stage_pids()
        bad = places.node_of(2)

        def disturb(passes: int) -> None:
            if passes == 10:
                kill_new(lambda: places.node_of(2) == bad and places.pid_of(2))

        assert answers(engine, "b", disturb) == want
        assert places.node_of(2) != bad and places.in_bundle(2) is False
        assert engine.stage_pids()[:2] == before[:2]
        assert engine.stats.recoveries[-1].rounds > 2


@contextmanager
def deadly() -> Iterator[Callable[[Callable[[], int]], None]]:
    """Kills, until the end, whatever process the given function names."""
    done = threading.Event()
    threads: list[threading.Thread] = []

    def start(find: Callable[[], int]) -> None:
        def run() -> None:
            while not done.wait(0.2):
                if pid := find():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

        threads.append(threading.Thread(target=run))
        threads[-1].start()

    try:
        yield start
    finally:
        done.set()
        for thread in threads:
            thread.join()
