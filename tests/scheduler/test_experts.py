"""Plans of mixtures whose layers are split: slots, budgets, loads, and what they cost."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import DEEPSEEK_V3, MIXTRAL, QWEN3_235B, TINY_MIXTURE
from plan_checks import check

from headrace.scheduler.errors import DoesNotFitError
from headrace.scheduler.experts import (
    ExpertPools,
    layer_loads,
    loads_ahead,
    num_experts,
    passing_slots,
    reached,
    transit_slots,
)
from headrace.scheduler.inputs import (
    Budget,
    Choices,
    DeviceProfile,
    Experts,
    ModelShape,
    Workload,
)
from headrace.scheduler.placement import (
    Placement,
    Plan,
    Tier,
    contiguous_visits,
    cyclic_visits,
)
from headrace.scheduler.planner import make_plan
from headrace.scheduler.simulate import ExpertTimes, Timing, simulate

GIB = 1 << 30
GPU = DeviceProfile("cuda", 7.0, 24.0, 100.0, 1000.0, 2e-4, 10.0)
CPU = DeviceProfile("cpu", 1.5, 8.0, 0.05, 20.0, 3e-4, 4.8)


def plan_of(
    shape: ModelShape,
    device: float,
    host: float = 0,
    *,
    stages: int = 1,
    context: int = 1024,
    max_sequences: int | None = None,
    **choices: int | str,
) -> Plan:
    """A checked plan; memory in GiB."""
    budgets = [Budget(int(device * GIB), int(host * GIB))] * stages
    workload = Workload(context, max_sequences)
    plan = make_plan(shape, [GPU] * stages, budgets, workload, Choices(**choices))  # type: ignore[arg-type]
    check(plan, shape, budgets)
    return plan


def test_expected_experts() -> None:
    experts = Experts(128, 8, 0, 4096)
    assert reached(experts, 1) == pytest.approx(8)
    assert reached(experts, 32) / 128 == pytest.approx(0.873, abs=1e-3)
    assert reached(experts, 1e6) == pytest.approx(128)
    assert reached(Experts(4, 4, 0, 4096), 1) == 4


def test_one_sequence_loads_the_experts_it_reaches() -> None:
    plan = plan_of(QWEN3_235B, 24, max_sequences=1, resident_layers=0)
    traffic = plan.prediction.experts
    assert traffic is not None
    assert traffic.reached == pytest.approx(94 * 8)
    kept = plan.expert_slots[0] - passing_slots(plan.expert_slots[0], plan.expert_slot_bytes)
    assert traffic.loaded == pytest.approx(94 * 8 * (1 - kept / (94 * 128)))
    needed = sum(plan.nvme_bytes_a_pass) + traffic.loaded * plan.expert_slot_bytes
    assert plan.prediction.terms["nvme"] == pytest.approx(needed / 7e9)
    whole = sum(QWEN3_235B.layer_bytes)
    assert needed < 0.12 * whole


def test_many_sequences_load_all_experts() -> None:
    plan = plan_of(QWEN3_235B, 24, resident_layers=0, max_sequences=100)
    traffic = plan.prediction.experts
    assert traffic is not None and plan.prediction.sequences > 64
    assert traffic.reached > 0.98 * 94 * 128
    moved = sum(plan.nvme_bytes_a_pass) + traffic.nvme_bytes
    assert moved == pytest.approx(sum(QWEN3_235B.layer_bytes), rel=0.03)


@pytest.mark.parametrize("device", [12, 24])
def test_deepseek_has_a_plan_where_two_whole_layers_do_not_fit(device: int) -> None:
    with pytest.raises(DoesNotFitError):
        plan_of(replace(DEEPSEEK_V3, experts=()), 12)
    plan = plan_of(DEEPSEEK_V3, device)
    assert plan.expert_slots[0] >= 8
    held = DEEPSEEK_V3.held_bytes(split=True)
    assert max(held) == DEEPSEEK_V3.layer_bytes[0]  # a layer without experts
    assert all(memory.ring <= 4 * max(held) for memory in plan.memory)


def test_the_real_models_on_small_devices() -> None:
    mixtral = plan_of(MIXTRAL, 12, max_sequences=1)
    assert set(mixtral.placement.tiers) == {Tier.DEVICE}  # all but the experts
    assert 80 < mixtral.expert_slots[0] < 256
    qwen = plan_of(QWEN3_235B, 24, 64, max_sequences=1)
    assert set(qwen.placement.tiers) == {Tier.DEVICE}
    assert qwen.expert_slots[0] > 1000 and qwen.host_experts[0] > 5000
    assert 63 * GIB < qwen.memory[0].host <= 64 * GIB
    cold = plan_of(QWEN3_235B, 24, max_sequences=1)
    assert qwen.prediction.tokens_per_second > 1.5 * cold.prediction.tokens_per_second


def test_what_fits_whole_is_not_split() -> None:
    plan = plan_of(MIXTRAL, 80)
    assert set(plan.placement.tiers) == {Tier.DEVICE} and plan.expert_slots == ()
    assert plan.memory[0].resident == sum(MIXTRAL.layer_bytes)
    # With KV for a few sequences only it is as fast, and simpler.
    few = plan_of(MIXTRAL, 28, max_sequences=2)
    assert few.expert_slots == ()


def test_a_stage_never_has_more_slots_than_experts() -> None:
    plan = plan_of(MIXTRAL, 100, 100, resident_layers=3, max_sequences=64)
    assert plan.expert_slots == (256,) and plan.host_experts == (0,)
    assert plan.prediction.experts is not None and plan.prediction.experts.loaded == 0
    assert plan.placement.tiers.count(Tier.DEVICE) == 3


def test_nothing_resident_leaves_room_for_one_layer_ahead() -> None:
    for micro_batches, transit in ((1, 8), (4, 128)):
        choices = {"resident_layers": 0, "micro_batches": micro_batches}
        plan = plan_of(QWEN3_235B, 140, max_sequences=64, **choices)
        assert plan.expert_slots == (transit + 128,)
        assert not any(tier is Tier.DEVICE for tier in plan.placement.tiers)
    some = plan_of(QWEN3_235B, 140, resident_layers=2, max_sequences=1)
    assert some.expert_slots[0] > 2000


def test_dense_parts_go_before_experts_in_host_memory_too() -> None:
    plan = plan_of(QWEN3_235B, 24, 4, max_sequences=1, resident_layers=10)
    held = QWEN3_235B.held_bytes(split=True)
    assert plan.placement.tiers.count(Tier.HOST) == 84
    assert plan.memory[0].host_layers == 84 * held[0]
    assert plan.host_experts[0] == (4 * GIB - 84 * held[0]) // plan.expert_slot_bytes


def test_several_micro_batches_share_what_one_has_loaded() -> None:
    visits = cyclic_visits(94, 1, 2)
    assert transit_slots(QWEN3_235B, visits, 0, 4) == 256
    assert transit_slots(QWEN3_235B, visits, 0, 1) == 8
    assert transit_slots(MIXTRAL, contiguous_visits(32, 1, 1), 0, 1) == 8
    placement = Placement(1, contiguous_visits(94, 1, 1), (Tier.NVME,) * 94)
    pools = ExpertPools(QWEN3_235B.expert_bytes, (256,), (0,))
    one, four = (
        sum(x.reached for x in layer_loads(QWEN3_235B, placement, pools, n, 16 / n).values())
        for n in (1, 4)
    )
    assert one == pytest.approx(four)


def test_experts_are_loaded_ahead_where_nearly_all_are_reached() -> None:
    placement = Placement(1, contiguous_visits(94, 1, 1), (Tier.NVME,) * 94)
    pools = ExpertPools(QWEN3_235B.expert_bytes, (64,), (0,))
    for rows in (8, 28):
        assert layer_loads(QWEN3_235B, placement, pools, 1, rows)[0].ahead == 0
    for rows in (36, 256):
        loads = layer_loads(QWEN3_235B, placement, pools, 1, rows)[0]
        assert loads.ahead * loads.loaded == pytest.approx(
            8
        )  # half of the slots in which they pass
    assert loads_ahead(QWEN3_235B, placement, pools, (3,), 1) == (2,)
    assert loads_ahead(QWEN3_235B, placement, pools, (0,), 4) == (2,)
    large = ExpertPools(MIXTRAL.expert_bytes, (100,), (0,))
    few = Placement(1, contiguous_visits(32, 1, 1), (Tier.NVME,) * 32)
    assert loads_ahead(MIXTRAL, few, large, (8,), 1) == (2,)


def test_few_slots_are_for_what_passes() -> None:
    sizes = [passing_slots(n, QWEN3_235B.expert_bytes) for n in (1, 4, 8, 40, 128, 4000)]
    assert sizes == [1, 4, 4, 10, 32, 32]
    assert passing_slots(4000, 128 << 20) == 8
    assert passing_slots(4000, 4 << 30) == 4
    assert passing_slots(4000, 4096, held=200) == 200
    assert passing_slots(100, 4096, held=200) == 100


def test_host_memory_takes_its_share_of_what_is_missing() -> None:
    placement = Placement(1, contiguous_visits(32, 1, 1), (Tier.DEVICE,) * 32)
    assert passing_slots(64 + 10, MIXTRAL.expert_bytes) == 10
    pools = ExpertPools(MIXTRAL.expert_bytes, (64 + 10,), (128,))
    loads = layer_loads(MIXTRAL, placement, pools, 1, 1)[5]
    assert loads.loaded == pytest.approx(2 * 0.75)
    assert loads.host_bytes == pytest.approx(2 * loads.nvme_bytes)  # 128 of the other 192
    assert loads.nvme_bytes + loads.host_bytes == pytest.approx(1.5 * MIXTRAL.expert_bytes)


def simulated(load: float, compute: float, experts: ExpertTimes, slots: int = 2) -> float:
    """Seconds a layer of one stage that streams all of 16."""
    layers = 16
    placement = Placement(1, contiguous_visits(layers, 1, 1), (Tier.NVME,) * layers)
    times = Timing(
        (load,) * layers, (compute,) * layers, 0.0, 0.0, dict.fromkeys(range(layers), experts)
    )
    found = simulate(placement, times, ring_slots=[slots], micro_batches=1, passes_in_flight=1)
    return found / layers


def test_experts_behind_the_router_take_turns_with_compute() -> None:
    assert simulated(0.0, 0.5, ExpertTimes(1.0, 0.0, 0.0)) == pytest.approx(1.0)
    assert simulated(0.1, 0.5, ExpertTimes(1.0, 0.0, 0.0)) == pytest.approx(1.1)
    # The drive and the link work side by side.
    assert simulated(0.0, 0.1, ExpertTimes(1.0, 0.8, 0.0)) == pytest.approx(1.0)


def test_experts_ahead_of_the_router_are_hidden() -> None:
    assert simulated(0.1, 0.8, ExpertTimes(0.6, 0.0, 1.0)) == pytest.approx(0.8)
    assert simulated(0.1, 0.8, ExpertTimes(0.6, 0.0, 1.0), slots=1) == pytest.approx(1.5)
    assert simulated(0.1, 0.3, ExpertTimes(0.6, 0.0, 0.5)) == pytest.approx(0.7)


def test_more_sequences_never_take_less_time() -> None:
    plans = [plan_of(QWEN3_235B, 24, 64, max_sequences=n) for n in (1, 4, 16, 64)]
    seconds = [plan.prediction.pass_seconds for plan in plans]
    assert seconds == sorted(seconds)


def test_sequences_that_are_no_faster_together_still_share_prompts_passes() -> None:
    plan = plan_of(DEEPSEEK_V3, 32, max_sequences=8)
    one = plan_of(DEEPSEEK_V3, 32, max_sequences=1)
    assert plan.prediction.sequences > 1
    rates = [p.prediction.tokens_per_second for p in (one, plan)]
    assert rates[1] > 0.97 * rates[0]


def test_room_for_the_sequences_that_are_asked_for() -> None:
    budgets = [Budget(48 * GIB, 0)]
    workload = Workload(1024, 6, min_sequences=6)
    plan = make_plan(DEEPSEEK_V3, [GPU], budgets, workload)
    check(plan, DEEPSEEK_V3, budgets)
    assert plan.prediction.sequences == 6 and plan.num_pages == 6 * 16
    more = make_plan(DEEPSEEK_V3, [GPU], budgets, replace(workload, min_sequences=100))
    assert 6 >= more.prediction.sequences >= 1


@pytest.mark.parametrize("sequences", [1, 8, 64])
@pytest.mark.parametrize("shape", [MIXTRAL, QWEN3_235B], ids=["mixtral", "qwen3-235b"])
def test_more_memory_never_predicts_slower(shape: ModelShape, sequences: int) -> None:
    for memory in ([(d, 16) for d in (10, 12, 16, 24, 48)], [(16, h) for h in (0, 8, 32, 64, 128)]):
        plans = [plan_of(shape, *sizes, max_sequences=sequences) for sizes in memory]
        rates = [plan.prediction.tokens_per_second for plan in plans]
        # A larger candidate has to be two percent better to be taken.
        assert all(b >= 0.98 * a for a, b in pairwise(rates)), rates


def test_cyclic_stages_wait_for_a_single_micro_batch() -> None:
    """Experts that are chosen by a router can only be loaded by the stage whose turn it is."""
    one = plan_of(QWEN3_235B, 12, stages=4, placement="cyclic", max_sequences=1, resident_layers=0)
    traffic = one.prediction.experts
    assert traffic is not None
    dense = max(one.nvme_bytes_a_pass)
    busiest = max(len(one.placement.layers_of(stage)) for stage in range(4)) / 94
    seconds = (dense + 4 * busiest * traffic.nvme_bytes) / 7e9
    assert one.prediction.terms["nvme"] == pytest.approx(seconds, rel=0.02)


def test_the_refusal_counts_slots_for_experts() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan_of(DEEPSEEK_V3, 3)
    message = str(caught.value)
    assert "  experts " in message and "slots for those that a pass loads" in message
    size = message.split("--device-memory at least ")[1].split(" GiB")[0]
    assert plan_of(DEEPSEEK_V3, float(size) + 0.001).expert_slots == (8,)
    bf16 = replace(
        MIXTRAL,
        layer_bytes=tuple(n * 3 for n in MIXTRAL.layer_bytes),
        experts=tuple(
            replace(e, dense_bytes=3 * e.dense_bytes, expert_bytes=3 * e.expert_bytes)
            for e in MIXTRAL.experts
            if e
        ),
    )
    with pytest.raises(DoesNotFitError, match=r"a store in nf4 .* fits"):
        plan_of(bf16, 2.5)


@st.composite
def mixtures(draw: st.DrawFn) -> ModelShape:
    layers = draw(st.integers(1, 12))
    own: list[Experts | None] = []
    for _ in range(layers):
        count = draw(st.integers(0, 12))
        sizes = draw(st.integers(1, 8)), draw(st.integers(1, 8))
        split = (
            Experts(count, draw(st.integers(1, count)), *(4096 * n for n in sizes))
            if count
            else None
        )
        own.append(split)
    whole = tuple(8192 if e is None else e.dense_bytes + e.count * e.expert_bytes for e in own)
    return replace(
        TINY_MIXTURE,
        layer_bytes=whole,
        layer_kv_bytes=tuple(draw(st.integers(1, 8)) * 512 for _ in whole),
        layer_parameters=tuple(n * 2 for n in whole),
        layer_active_parameters=tuple(n // 2 for n in whole),
        experts=tuple(own),
        needs_scratch=draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None)
@given(
    shape=mixtures(),
    budgets=st.lists(
        st.builds(Budget, st.integers(2 * 10**5, 6 * 10**6), st.integers(0, 10**6)),
        min_size=1,
        max_size=3,
    ),
    profile=st.sampled_from([CPU, GPU]),
    context=st.integers(1, 300),
    max_sequences=st.none() | st.integers(1, 40),
    placement=st.sampled_from(["auto", "cyclic", "contiguous"]),
    micro_batches=st.none() | st.integers(1, 4),
    resident_layers=st.none() | st.integers(0, 4),
)
def test_every_split_plan_keeps_every_budget(
    shape: ModelShape,
    budgets: list[Budget],
    profile: DeviceProfile,
    context: int,
    max_sequences: int | None,
    placement: str,
    micro_batches: int | None,
    resident_layers: int | None,
) -> None:
    choices = Choices(placement, None, None, micro_batches, resident_layers)
    workload = Workload(context, max_sequences)
    try:
        plan = make_plan(shape, [profile] * len(budgets), budgets, workload, choices)
    except DoesNotFitError:
        return
    check(plan, shape, budgets)
    if not shape.can_split:
        assert plan.expert_slots == ()
    for stage, slots in enumerate(plan.expert_slots):
        if not num_experts(shape, plan.placement.layers_of(stage)):
            assert slots == plan.host_experts[stage] == 0
