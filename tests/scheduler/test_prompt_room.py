"""Passes have as many tokens of prompts as streaming hides, and no layer or decode pays for them."""

from dataclasses import replace

import pytest
from large_shapes import LLAMA_70B
from plan_checks import check

from headrace.scheduler.inputs import Budget, Choices, DeviceProfile, Workload
from headrace.scheduler.placement import Plan, Tier
from headrace.scheduler.planner import make_plan

GB = 10**9
SLOW_DRIVE = DeviceProfile("cuda", 2.0, 24.0, 100.0, 1000.0, 2e-4, 10.0)


def plan_of(
    device: float,
    profile: DeviceProfile = SLOW_DRIVE,
    *,
    host: float = 0,
    stages: int = 1,
    workload: Workload | None = None,
    **choices: int | tuple[int, ...],
) -> Plan:
    budgets = [Budget(int(device), int(host))] * stages
    wanted = workload or Workload(1024)
    plan = make_plan(LLAMA_70B, [profile] * stages, budgets, wanted, Choices(**choices))  # type: ignore[arg-type]
    check(plan, LLAMA_70B, budgets)
    return plan


def prompt_rate(plan: Plan) -> float:
    return plan.prediction.prompt_tokens / plan.prediction.prompt_seconds


@pytest.mark.parametrize(("stages", "tflops"), [(1, 120.0), (1, 700.0), (2, 700.0)])
def test_prompts_fill_what_streaming_leaves_of_a_pass(stages: int, tflops: float) -> None:
    profile = replace(SLOW_DRIVE, tflops=tflops)
    device = 24 * GB if stages == 1 else 16 * GB
    split = (80 // stages,) * stages
    plan = plan_of(device, profile, stages=stages, stage_layers=split)
    before = plan_of(device, profile, stages=stages, stage_layers=split, token_budget=8192)
    assert plan.token_budget >= 8192 * 5 // 4
    assert prompt_rate(plan) > 1.2 * prompt_rate(before)
    # Nobody waits longer, for a first token or for the next, and as many layers stay.
    new, old = plan.prediction, before.prediction
    assert new.prompt_seconds <= 1.02 * old.prompt_seconds
    assert new.expected_seconds <= 1.001 * old.expected_seconds
    assert new.expected_rate * 1.02 >= old.expected_rate
    assert plan.placement == before.placement
    # What one prompt has of a pass is no less.
    assert plan.micro_batch_tokens >= before.micro_batch_tokens
    assert plan.micro_batches > before.micro_batches


def test_a_faster_processor_computes_more_of_them() -> None:
    budgets = [
        plan_of(24 * GB, replace(SLOW_DRIVE, tflops=tflops)).token_budget
        for tflops in (50.0, 120.0, 700.0)
    ]
    assert budgets[0] == 8192 < budgets[1] < budgets[2]


def test_nothing_changes_where_memory_is_short() -> None:
    plan = plan_of(8 * GB, replace(SLOW_DRIVE, tflops=700.0))
    assert plan.token_budget == 2048
    assert plan == plan_of(8 * GB, replace(SLOW_DRIVE, tflops=700.0), token_budget=2048)


def test_nothing_changes_where_host_memory_feeds_faster_than_is_computed() -> None:
    plan = plan_of(24 * GB, host=64 * GB)
    assert Tier.HOST in plan.placement.tiers and plan.prediction.bound_by == "pcie"
    assert plan == plan_of(24 * GB, host=64 * GB, token_budget=8192)


def test_nothing_changes_where_all_layers_stay() -> None:
    plan = plan_of(80 * GB)
    assert set(plan.placement.tiers) == {Tier.DEVICE}
    assert plan == plan_of(80 * GB, token_budget=plan.token_budget)
    assert not plan.prediction.prompt_seconds and not plan.prediction.prompt_tokens


def test_no_more_than_the_sequences_can_fill() -> None:
    fast = replace(SLOW_DRIVE, tflops=700.0)
    few = plan_of(24 * GB, fast, workload=Workload(1024, 8))
    assert few.token_budget == 8192
    some = plan_of(24 * GB, fast, workload=Workload(1024, 16))
    assert 8192 < some.token_budget <= 16 * 1024
    assert (
        some.max_sequences == 16
        or some.prediction.expected_rate * 1.02 >= few.prediction.expected_rate
    )


def test_the_option_wins() -> None:
    for tokens in (4096, 8192, 10000):
        assert plan_of(24 * GB, token_budget=tokens).token_budget == tokens


def test_as_many_micro_batches_as_were_asked_for_are_larger() -> None:
    plan = plan_of(24 * GB, replace(SLOW_DRIVE, tflops=700.0), micro_batches=8)
    assert plan.micro_batches == 8 and plan.token_budget > 8192
    assert plan.micro_batch_tokens > 1024


def test_room_is_kept_for_the_sequences_that_are_needed() -> None:
    fast = replace(SLOW_DRIVE, tflops=700.0)
    most = plan_of(24 * GB, fast, token_budget=8192).prediction.sequences
    needed = plan_of(24 * GB, fast, workload=Workload(1024, None, most))
    assert needed.prediction.sequences == most
