from dataclasses import replace

import pytest
from mixtures import MIXTRAL

from headrace.cluster.bench.bounds import Bound, decode_bound, prefill_bound
from headrace.cluster.bench.driver import Steady
from headrace.cluster.bench.needed import Bytes, cold_bytes, expert_bytes
from headrace.cluster.bench.phases import Measured
from headrace.cluster.pass_bound import least_seconds
from headrace.scheduler.inputs import Budget, Choices, DeviceProfile, ModelShape, Workload
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan import StageTimes
from headrace.scheduler.planner import make_plan

SPEEDS = DeviceProfile("cuda", 2.0, 50.0, 100.0, 1000.0, 1e-4, 10.0)
LAYER = 50_003_968
SHAPE = ModelShape(
    layer_bytes=(LAYER,) * 4,
    kv_format="bf16",
    layer_kv_bytes=(65536,) * 4,
    layer_parameters=(100_000_000,) * 4,
    layer_active_parameters=(100_000_000,) * 4,
    largest_matrix=10_000_000,
    embed_bytes=1 << 20,
    head_bytes=1 << 20,
    hidden_size=1024,
    vocab_size=32000,
    intermediate_size=4096,
    max_context=1024,
    compute_bytes=2,
    needs_scratch=True,
)


def plan_of(stages: int, placement: str, host: int = 0) -> Plan:
    return make_plan(
        SHAPE,
        [SPEEDS] * stages,
        [Budget(2 << 30, host)] * stages,
        Workload(context=256),
        Choices(placement=placement, token_budget=512, max_sequences=64, resident_layers=0),
    )


def test_one_drive_serves_all_stages() -> None:
    for stages in (1, 2):
        found = decode_bound(
            plan_of(stages, "cyclic" if stages > 1 else "auto"), SHAPE, SPEEDS, 64, 256
        )
        assert found.terms["nvme"] == pytest.approx(4 * LAYER / 2e9)
        assert found.terms["pcie"] == pytest.approx(4 * LAYER / stages / 50e9)
        assert found.bound_by == "nvme"
        assert found.seconds == found.terms["nvme"]


def test_each_group_in_flight_has_its_layers_read_again() -> None:
    plan = plan_of(2, "contiguous")
    assert plan.passes_in_flight == 2
    found = decode_bound(plan, SHAPE, SPEEDS, 128, 256)
    assert found.terms["nvme"] == pytest.approx(2 * 4 * LAYER / 2e9)


def test_prefill_takes_the_fewest_passes_that_the_token_budget_allows() -> None:
    plan = plan_of(1, "auto", host=1 << 30)
    found = prefill_bound(plan, SHAPE, SPEEDS, 64, 128)
    assert found.terms["pcie"] == pytest.approx(64 * 128 / 512 * 4 * LAYER / 50e9)
    # No logits but the last tokens' are needed, so the head does not count.
    assert found.terms["compute"] == pytest.approx(2 * 4e8 * 64 * 128 / 100e12)
    assert found.terms["nvme"] == 0


def split_plan() -> Plan:
    """Mixtral on one device, all of it on the drive."""
    budget = Budget(12 << 30, 0)
    choices = Choices(resident_layers=0, micro_batches=1)
    return make_plan(MIXTRAL, [SPEEDS], [budget], Workload(256, 4), choices)


def test_what_tokens_needed_of_experts_binds_not_what_was_moved() -> None:
    plan = split_plan()
    dense, expert = sum(plan.nvme_bytes_a_pass), plan.expert_slot_bytes
    # 60 were loaded for tokens, ten more that none of them reached.
    decode = StageTimes(0, 3.0, 2.0, 0.0, dense + 70 * expert, 0, 100, 60)
    prefill = StageTimes(0, 9.0, 2.0, 0.0, 2 * dense + 512 * expert, 0, 512, 512)
    found = Steady(9.0, (3.0, 3.0), (decode,), (prefill,), 2, 4.0)
    measured = Measured(plan, MIXTRAL, SPEEDS, 4, found)
    phase = measured.decode(256)
    assert (phase.needed_bytes, phase.moved_bytes) == (dense + 60 * expert, dense + 70 * expert)
    assert phase.bound.terms["nvme"] == pytest.approx(phase.needed_bytes / 2e9)
    assert phase.bound.terms["pcie"] == pytest.approx(phase.needed_bytes / 50e9)
    assert phase.bound.bound_by == "nvme"
    first = measured.prefill(128)
    assert first.needed_bytes == first.moved_bytes == 2 * dense + 512 * expert
    # The fewest passes are one: that two were taken is not the bound's affair.
    assert first.bound.terms["nvme"] == pytest.approx((dense + 512 * expert) / 2e9)


def test_a_running_job_s_bound_counts_the_experts_that_a_pass_loaded() -> None:
    plan = split_plan()
    traffic, dense = plan.prediction.experts, sum(plan.nvme_bytes_a_pass)
    assert traffic is not None and plan.prediction.bound_by == "nvme"
    expected = round(traffic.loaded)
    whole = least_seconds(plan, 1, expected)
    assert whole == pytest.approx(plan.prediction.terms["nvme"], rel=0.01)
    fewer = dense + expected // 4 * plan.expert_slot_bytes
    share = fewer / (dense + expected * plan.expert_slot_bytes)
    assert least_seconds(plan, 1, expected // 4) == pytest.approx(whole * share, rel=0.01)


def test_experts_come_from_where_most_of_them_came_from() -> None:
    plan = split_plan()
    dense, expert = sum(plan.nvme_bytes_a_pass), plan.expert_slot_bytes
    times = StageTimes(0, 3.0, 2.0, 0.0, dense + 30 * expert, 10 * expert, 50, 20)
    assert expert_bytes(plan, [times], 1) == (Bytes(15 * expert, 5 * expert),)
    nothing = StageTimes(0, 3.0, 2.0, 0.0, dense, 0, 50, 0)
    assert expert_bytes(plan, [nothing], 1) == (Bytes(0, 0),)


def test_no_share_of_a_bound_that_was_beaten() -> None:
    bound = Bound({"nvme": 1.0, "compute": 0.5})
    assert bound.share(2.0) == 0.5
    assert bound.share(0.99) == pytest.approx(1.0, abs=0.02)
    assert bound.share(0.8) is None


def test_a_pass_s_bound_counts_the_pages_that_it_brings() -> None:
    budget = Budget(200 << 20, 4 << 30, kv_host_memory=3 << 30)
    choices = Choices(resident_layers=0, token_budget=512)
    fast = replace(SPEEDS, host_gbps=20.0)
    plan = make_plan(SHAPE, [fast], [budget], Workload(context=1024), choices)
    found = plan.prediction
    assert found.guests > 0 and found.bound_by == "pcie"
    assert found.cold_pages == 15 * found.guests
    assert least_seconds(plan, 1, 0, found.cold_pages) == pytest.approx(found.terms["pcie"])
    weights = sum(plan.host_bytes_a_pass) / 20e9
    assert least_seconds(plan, 1) == pytest.approx(weights)
    half = weights + found.cold_pages // 2 * 4 * 65536 / 20e9
    assert least_seconds(plan, 1, 0, found.cold_pages // 2) == pytest.approx(half)


def test_pages_that_a_round_brought_cross_the_link() -> None:
    plan = plan_of(1, "auto", host=1 << 30)
    pages, layers = 7 << 30, sum(plan.host_bytes_a_pass)
    times = StageTimes(0, 3.0, 2.0, 0.0, 0, layers, kv_cold_bytes=pages)
    found = Steady(9.0, (3.0, 3.0), (times,), (times,), 1, 4.0)
    bound = Measured(plan, SHAPE, SPEEDS, 4, found).decode(256).bound
    assert bound.terms["pcie"] == pytest.approx((layers + pages) / 50e9)


def test_pages_that_a_pass_reads_of_nvme_are_the_drive_s_too() -> None:
    budget = Budget(400 << 20, 4 << 30, kv_host_memory=256 << 20, kv_disk=8 << 30)
    choices = Choices(resident_layers=0, token_budget=512, kv_hot_window=64)
    fast = replace(SPEEDS, host_gbps=20.0)
    workload = Workload(context=1024, min_sequences=200)
    plan = make_plan(SHAPE, [fast], [budget], workload, choices)
    found = plan.prediction
    assert found.sunk_pages and found.bound_by == "nvme"
    whole = least_seconds(plan, 1, 0, found.cold_pages, round(found.sunk_bytes))
    assert whole == pytest.approx(found.terms["nvme"], rel=1e-6)
    less = least_seconds(plan, 1, 0, 0, round(found.sunk_bytes / 2))
    assert less == pytest.approx(found.terms["nvme"] - found.sunk_seconds / 2, rel=1e-6)
    times = StageTimes(0, 1.0, 0.0, 0.0, 0, 0, kv_cold_bytes=9, kv_sunk_bytes=4)
    (read,) = cold_bytes([times])
    assert read == Bytes(4, 5)
    without = decode_bound(plan, SHAPE, fast, 4, 1024).terms
    bound = decode_bound(plan, SHAPE, fast, 4, 1024, cold=[Bytes(2 * 10**9, 10**9)]).terms
    assert bound["nvme"] == pytest.approx(without["nvme"] + 2.0 / fast.nvme_gbps)
