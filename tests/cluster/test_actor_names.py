"""Stages as Ray lists them."""

import pytest
import ray

from headrace.cluster.processes import StageProcesses, ray_cluster
from headrace.cluster.pulses import Pulses


def names() -> set[str]:
    return set(ray.util.list_named_actors())


@pytest.mark.slow
def test_stages_have_names_also_those_that_take_others_places() -> None:
    with ray_cluster(2, None), Pulses("127.0.0.1", 0, 60.0) as pulses:
        with StageProcesses(2, "cpu", "m", pulses, "m-1") as first:
            assert names() == {"headrace m-1 stage 0 of 2", "headrace m-1 stage 1 of 2"}
            first.stop(first.actors[1])
            first.replace(1, first.start(1), None)
            another = "headrace m-1 stage 1 of 2, process 2"
            assert another in names()
            assert ray.get_actor(another) == first.actors[1]
        # Another ring goes on under the name of the first one, whose actors are hardly gone.
        with StageProcesses(2, "cpu", "m", pulses, "m-1") as second:
            found = {name for name in names() if ray.get_actor(name) in second.actors}
            assert found == {
                "headrace m-1 stage 0 of 2, process 2",
                "headrace m-1 stage 1 of 2, process 3",
            }
