"""Drafts ride where the planner's model says that they cost nothing."""

from dataclasses import replace

from large_shapes import LLAMA_70B

from headrace.scheduler.config import DraftLimits
from headrace.scheduler.inputs import (
    Budget,
    Choices,
    DeviceProfile,
    Experts,
    ModelShape,
    Workload,
)
from headrace.scheduler.placement import Plan
from headrace.scheduler.planner import make_plan

GB = 10**9
GPU = DeviceProfile("cuda", 7.0, 24.0, 100.0, 1000.0, 2e-4, 10.0)
EXPERTS = Experts(count=128, per_token=8, dense_bytes=40 << 20, expert_bytes=10 << 20)
"""8 of 128 for each token: 30 tokens reach 0.85 of them."""
MIXTURE = replace(
    LLAMA_70B,
    layer_bytes=(1320 << 20,) * 80,
    layer_parameters=(2_500_000_000,) * 80,
    layer_active_parameters=(230_000_000,) * 80,
    largest_matrix=8192 * 8192,
    experts=(EXPERTS,) * 80,
)


def plan_of(
    shape: ModelShape,
    device: float,
    profile: DeviceProfile = GPU,
    sequences: int | None = None,
    **choices: int,
) -> Plan:
    budget = Budget(int(device), 0)
    return make_plan(shape, [profile], [budget], Workload(1024, sequences), Choices(**choices))  # type: ignore[arg-type]


def test_drafts_ride_where_streaming_binds() -> None:
    plan = plan_of(LLAMA_70B, 24 * GB)
    drafts = plan.drafts
    assert plan.prediction.bound_by == "nvme" and drafts.most == 8 and not drafts.least_tokens
    assert 2 * plan.max_sequences < drafts.most_tokens <= plan.token_budget
    assert 0.1 < drafts.least_gain < 0.11
    slower = plan_of(LLAMA_70B, 24 * GB, replace(GPU, tflops=12.0))
    assert slower.drafts.most_tokens < drafts.most_tokens
    resident = plan_of(LLAMA_70B, 80 * GB)
    assert not sum(resident.nvme_bytes_a_pass) and resident.drafts == DraftLimits()


def test_drafts_as_they_were_asked_for() -> None:
    assert plan_of(LLAMA_70B, 24 * GB, drafts=0).drafts == DraftLimits()
    for device in (24 * GB, 80 * GB):
        plan = plan_of(LLAMA_70B, device, drafts=3)
        assert (plan.drafts.most, plan.drafts.most_tokens) == (3, plan.token_budget)


def test_mixtures_of_which_few_experts_are_reached_carry_none() -> None:
    few = plan_of(MIXTURE, 64 * GB, sequences=4)
    assert any(few.expert_slots) and few.prediction.bound_by == "nvme"
    assert few.drafts == DraftLimits()
    many = plan_of(MIXTURE, 64 * GB)
    assert any(many.expert_slots) and many.drafts.least_tokens == 30
    assert many.drafts.most_tokens > 2 * many.max_sequences
