"""Stages that are not alike: how layers are shared among them."""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from plan_checks import check

from headrace.scheduler.errors import DoesNotFitError
from headrace.scheduler.inputs import Budget, Choices, DeviceProfile, ModelShape, Workload
from headrace.scheduler.links import Hop, Links
from headrace.scheduler.placement import Plan, Tier, cyclic_turns
from headrace.scheduler.planner import make_plan

GB = 10**9
GPU = DeviceProfile("cuda", 7.0, 24.0, 100.0, 1000.0, 2e-4, 10.0)


def llama(layers: int, hidden: int, intermediate: int, vocabulary: int = 128256) -> ModelShape:
    parameters = int(2.25 * hidden**2) + 3 * hidden * intermediate
    return ModelShape(
        layer_bytes=(int(parameters * 4.5 / 8) // 4096 * 4096,) * layers,
        kv_format="bf16",
        layer_kv_bytes=(262144,) * layers,
        layer_parameters=(parameters,) * layers,
        layer_active_parameters=(parameters,) * layers,
        largest_matrix=hidden * intermediate,
        embed_bytes=2 * vocabulary * hidden,
        head_bytes=2 * vocabulary * hidden,
        hidden_size=hidden,
        vocab_size=vocabulary,
        intermediate_size=intermediate,
        max_context=131072,
        compute_bytes=2,
        needs_scratch=True,
    )


SMALL_HEAD = llama(80, 8192, 28672, vocabulary=1024)
LLAMA_405B = llama(126, 16384, 53248)


def plan_of(
    shape: ModelShape,
    profiles: Sequence[DeviceProfile],
    budgets: Sequence[Budget],
    links: Links | None = None,
    context: int = 1024,
    **choices: str | int | tuple[int, ...],
) -> Plan:
    plan = make_plan(shape, profiles, budgets, Workload(context), Choices(**choices), links)  # type: ignore[arg-type]
    check(plan, shape, list(budgets))
    return plan


def layers_of(plan: Plan) -> list[int]:
    return [len(plan.placement.layers_of(stage)) for stage in range(plan.placement.num_stages)]


def even(shape: ModelShape, stages: int) -> tuple[int, ...]:
    return tuple(
        shape.num_layers // stages + (stage < shape.num_layers % stages) for stage in range(stages)
    )


@pytest.mark.parametrize("placement", ["cyclic", "contiguous"])
def test_a_slow_drive_streams_as_much_less(placement: str) -> None:
    profiles = [GPU, replace(GPU, nvme_gbps=3.5), GPU]
    budgets = [Budget(8 * GB, 0)] * 3
    plan = plan_of(SMALL_HEAD, profiles, budgets, placement=placement, resident_layers=0)
    fast, slow, other = layers_of(plan)
    assert slow == pytest.approx(16, abs=1) and fast == pytest.approx(other, abs=1)
    same = plan_of(
        SMALL_HEAD,
        profiles,
        budgets,
        placement=placement,
        resident_layers=0,
        stage_layers=even(SMALL_HEAD, 3),
    )
    took = plan.prediction.expected_seconds / same.prediction.expected_seconds
    assert took == pytest.approx(16 / 27, rel=0.03)
    assert plan.prediction.expected_rate > 1.35 * same.prediction.expected_rate


def test_a_slow_link_to_host_memory_is_given_less_to_copy() -> None:
    profiles = [GPU, replace(GPU, host_gbps=6.0)]
    plan = plan_of(SMALL_HEAD, profiles, [Budget(8 * GB, 60 * GB)] * 2, resident_layers=0)
    assert layers_of(plan) == pytest.approx([64, 16], abs=2)


def test_a_large_gpu_keeps_more_layers() -> None:
    budgets = [Budget(48 * GB, 0), Budget(12 * GB, 0)]
    plan = plan_of(SMALL_HEAD, [GPU] * 2, budgets)
    large, small = layers_of(plan)
    assert large > 2 * small
    assert plan.placement.tiers.count(Tier.DEVICE) == 80  # half of them each would have streamed
    assert (
        Tier.NVME in plan_of(SMALL_HEAD, [GPU] * 2, budgets, stage_layers=(40, 40)).placement.tiers
    )


def test_a_slow_processor_computes_fewer_layers() -> None:
    weak = replace(GPU, tflops=25.0, hbm_gbps=250.0)
    plan = plan_of(SMALL_HEAD, [GPU, weak], [Budget(60 * GB, 0)] * 2)
    assert plan.passes_in_flight == 2
    assert layers_of(plan) == pytest.approx([64, 16], abs=2)


def test_the_stage_with_the_head_has_fewer_layers() -> None:
    """Alike stages: what the head takes of memory is what others have for layers."""
    plan = plan_of(LLAMA_405B, [GPU] * 4, [Budget(24 * GB, 0)] * 4)
    last = plan.placement.last_stage
    assert layers_of(plan)[last] == min(layers_of(plan)) < 31


def test_a_slow_network_is_crossed_as_seldom_as_can_be() -> None:
    """Two nodes of two GPUs: over 10 Mbit/s, going round for each layer costs more than it brings."""
    profiles, budgets = [GPU] * 4, [Budget(10 * GB, 60 * GB)] * 4
    nodes = ["a", "a", "b", "b"]

    def over(gbps: float) -> Plan:
        links = Links.of(profiles, nodes, [Hop(5e-4, gbps)] * 4)
        return plan_of(SMALL_HEAD, profiles, budgets, links, resident_layers=0)

    fast, slow = over(12.5), over(0.00125)
    assert fast.passes_in_flight == 1 and fast.micro_batches >= 4
    crossings = [
        sum(
            nodes[a.stage] != nodes[b.stage]
            for a, b in zip(plan.placement.visits, plan.placement.visits[1:], strict=False)
        )
        for plan in (fast, slow)
    ]
    assert crossings[0] > 10 and crossings[1] == 1


def test_links_are_the_weaker_of_both_ends_and_pairs_can_be_told() -> None:
    other = replace(GPU, hop_seconds=1e-3, link_gbps=1.0)
    links = Links.of([GPU, GPU, other])
    assert links.between(0, 1) == Hop(2e-4, 10.0)
    assert links.between(0, 2) == links.between(2, 0) == Hop(1e-3, 1.0)
    told = links.with_pair(2, 0, Hop(0.01, 0.0125))
    assert told.between(0, 2) == told.between(2, 0) == Hop(0.01, 0.0125)
    assert told.between(1, 2) == Hop(1e-3, 1.0)


def test_turns_are_spread_evenly() -> None:
    visits = cyclic_turns((6, 3, 1), 10, 1)
    stages = [visit.stage for visit in visits]
    assert [stages.count(stage) for stage in range(3)] == [6, 3, 1]
    gaps = [b - a for a, b in zip(*[[i for i, s in enumerate(stages) if s == 1]] * 2, strict=True)]
    assert not any(gaps) and max(map(len, "".join(map(str, stages)).split("0"))) <= 2


def test_sixteen_unlike_stages_are_planned_in_seconds() -> None:
    profiles = [replace(GPU, nvme_gbps=1.0 + stage % 5) for stage in range(16)]
    budgets = [Budget((12 + stage) * GB, 4 * GB) for stage in range(16)]
    started = time.process_time()
    plan = plan_of(LLAMA_405B, profiles, budgets)
    assert time.process_time() - started < 20
    assert plan == plan_of(LLAMA_405B, profiles, budgets)


def test_it_is_not_worse_than_an_even_split() -> None:
    """Proposals are heuristic: of 1,732 pools like these two were given a split that is worse."""
    rng, gains = random.Random(1), []
    uniform = rng.uniform
    while len(gains) < 60:
        stages, layers = rng.randint(2, 4), rng.randint(8, 24)
        placement = rng.choice(["auto", "cyclic", "contiguous"])
        profiles = [
            DeviceProfile(
                "cuda",
                nvme_gbps=uniform(0.3, 14),
                host_gbps=uniform(3, 55),
                tflops=uniform(20, 700),
                hbm_gbps=uniform(300, 4000),
                hop_seconds=uniform(1e-5, 2e-3),
                link_gbps=uniform(0.0125, 50),
                layer_seconds=rng.choice([0.0, uniform(0, 1e-3)]),
            )
            for _ in range(stages)
        ]
        budgets = [
            Budget(int(uniform(3, 40) * GB), rng.choice([0, int(uniform(0, 30) * GB)]))
            for _ in range(stages)
        ]
        shape = llama(layers, 8192, 28672)
        given = even(shape, stages)
        try:
            same = plan_of(shape, profiles, budgets, placement=placement, stage_layers=given)
        except DoesNotFitError:
            continue
        free = plan_of(shape, profiles, budgets, placement=placement)
        gains.append(free.prediction.expected_rate / same.prediction.expected_rate)
    # What is as good within 2 % is chosen by other virtues, twice.
    assert min(gains) * 1.0201 >= 1.0
    assert statistics.median(gains) > 1.3
