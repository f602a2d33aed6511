"""Ways between nodes are measured once a day, those of different pairs at the same time."""

from itertools import combinations
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from headrace.cluster.network_speed import NetworkSpeed, rounds
from headrace.cluster.stage_actor import StageActor
from headrace.scheduler.inputs import DeviceProfile
from headrace.scheduler.links import Links


@pytest.mark.parametrize("count", range(1, 9))
def test_all_pairs_meet_once_and_nobody_is_twice_in_a_round(count: int) -> None:
    groups = list(rounds(count))
    assert sorted(pair for group in groups for pair in group) == [*combinations(range(count), 2)]
    for group in groups:
        ends = [end for pair in group for end in pair]
        assert len(ends) == len({*ends})
    assert len(groups) <= count


@pytest.mark.slow
def test_stages_of_different_nodes_measure_their_way(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False}
    )
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        actors = [ray.remote(StageActor).remote(f"stage {i}") for i in range(3)]
        profile = DeviceProfile("cpu", 1.0, 1.0, 1.0, 1.0, 3e-4, 4.8)
        told = Links.of([profile] * 3)
        speed = NetworkSpeed("127.0.0.1", 0, "127.0.0.1", pinned=False, device="cpu")
        found = speed.links(told, actors, ["a", "a", "b"])
        assert found.between(0, 1) == told.between(0, 1)
        assert found.between(0, 2) == found.between(1, 2) == found.between(2, 0)
        assert 1e-6 < found.between(0, 2).seconds < 1.0
        assert found.between(0, 2) != told.between(0, 2)
        assert speed.links(told, [], ["a", "a", "b"]) == found  # remembered: nobody is asked
    finally:
        ray.shutdown()
        cluster.shutdown()
