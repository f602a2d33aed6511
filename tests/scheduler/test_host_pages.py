"""Host memory for KV pages: as many slots as every stage has room for, and no byte more."""

from dataclasses import replace

import pytest
from mixtures import QWEN3_235B, mixture
from plan_checks import check

from headrace.scheduler.errors import DoesNotFitError
from headrace.scheduler.inputs import Budget, Choices, DeviceProfile, ModelShape, Workload
from headrace.scheduler.memory import slot_bytes
from headrace.scheduler.placement import Plan, Tier
from headrace.scheduler.planner import make_plan

GB = 10**9
GPU = DeviceProfile("cuda", 7.0, 24.0, 100.0, 1000.0, 2e-4, 10.0)
CPU = DeviceProfile("cpu", 1.5, 8.0, 0.05, 20.0, 3e-4, 4.8)


def dense(layers: int, hidden: int, vocab: int, kv_columns: int) -> ModelShape:
    """A mixture without experts: an MLP of 3.5 times the hidden size."""
    shape = mixture(
        layers,
        hidden,
        vocab,
        attention=3 * hidden**2,
        expert_size=1,
        experts=1,
        per_token=1,
        kv_columns=kv_columns,
        dense_layers=layers,
        dense_size=7 * hidden // 2,
    )
    return replace(shape, experts=())


LLAMA_70B = dense(80, 8192, 128256, 2 * 8 * 128)
TINY = dense(8, 64, 512, 64)


def plan_of(
    shape: ModelShape,
    budgets: list[Budget],
    profile: DeviceProfile = GPU,
    workload: Workload | None = None,
    choices: Choices | None = None,
) -> Plan:
    profiles = [profile] * len(budgets)
    plan = make_plan(shape, profiles, budgets, workload or Workload(), choices)
    check(plan, shape, budgets)
    return plan


def test_slots_are_rounded_up() -> None:
    assert [slot_bytes(n) for n in (1, 4096, 4097)] == [4096, 4096, 8192]


def test_every_stage_has_as_many_slots_as_the_one_with_least_room() -> None:
    given = [8 * GB, 2 * GB, 8 * GB, 8 * GB]
    budgets = [Budget(24 * GB, 20 * GB, kv_host_memory=kv) for kv in given]
    plan = plan_of(LLAMA_70B, budgets)
    layers = [len(plan.placement.layers_of(stage)) for stage in range(4)]
    pages = [count * 64 * 8 * 128 * 2 * 2 for count in layers]
    assert plan.host_pages == min(kv // page for kv, page in zip(given, pages, strict=True))
    assert [memory.host_kv for memory in plan.memory] == [plan.host_pages * page for page in pages]
    assert all(memory.host >= memory.host_kv for memory in plan.memory)


def test_pages_go_before_layers_and_experts() -> None:
    short = Workload(context=64)  # a page, which nobody decodes over in host memory
    for shape, device in ((LLAMA_70B, 12 * GB), (QWEN3_235B, 16 * GB)):
        without = plan_of(shape, [Budget(device, 30 * GB)], workload=short)
        halved = plan_of(shape, [Budget(device, 30 * GB, kv_host_memory=15 * GB)], workload=short)
        as_half = plan_of(shape, [Budget(device, 15 * GB)], workload=short)
        assert without.host_pages == as_half.host_pages == 0 < halved.host_pages
        assert halved.placement == as_half.placement
        assert halved.host_experts == as_half.host_experts
        (more,), (less,) = without.memory, halved.memory
        assert more.host_layers + more.host_experts > less.host_layers + less.host_experts > 0
        assert replace(halved, host_pages=0, memory=as_half.memory) == as_half


def test_memory_that_all_goes_to_pages_leaves_layers_on_the_drive() -> None:
    plan = plan_of(LLAMA_70B, [Budget(12 * GB, 9 * GB, kv_host_memory=9 * GB)] * 3)
    assert plan.host_pages > 0 and Tier.HOST not in plan.placement.tiers


@pytest.mark.parametrize("given", [2_000_000, -1])
def test_more_than_there_is_is_refused(given: int) -> None:
    budgets = [Budget(10**8, 2_000_000), Budget(10**8, 10**6, kv_host_memory=given)]
    with pytest.raises(DoesNotFitError, match=r"--kv-host-memory .* stage 1 has: raise --host-mem"):
        plan_of(TINY, budgets, CPU)


def test_memory_that_holds_no_page_is_refused() -> None:
    least = 4 * 64 * 64 * 2
    assert plan_of(TINY, [Budget(10**8, 10**6, kv_host_memory=least)] * 2, CPU).host_pages == 1
    with pytest.raises(DoesNotFitError, match=r"holds no KV page .* at least 32.0 KiB for each"):
        plan_of(TINY, [Budget(10**8, 10**6, kv_host_memory=least - 1)] * 2, CPU)


def test_sequences_beyond_what_the_device_holds_raise_the_throughput() -> None:
    """Weights come from the drive, and the link is idle for most of a pass."""
    for stages, device in ((1, 24 * GB), (2, 16 * GB)):
        without = plan_of(LLAMA_70B, [Budget(device, 0)] * stages)
        budgets = [Budget(device, 60 * GB, kv_host_memory=60 * GB)] * stages
        plan = plan_of(LLAMA_70B, budgets)
        found, before = plan.prediction, without.prediction
        assert found.guests > 0 == before.guests
        assert found.tokens_per_second > 1.5 * before.tokens_per_second
        assert found.sequences > 1.5 * before.sequences
        page = 80 // stages * 64 * 8 * 128 * 2 * 2
        assert found.cold_pages == found.guests * 15
        assert found.cold_seconds == pytest.approx(found.cold_pages * page / 24e9, rel=0.01)


def test_pages_that_take_longer_than_their_tokens_are_worth_are_not_brought() -> None:
    """All layers stay on the device, and a pass takes milliseconds."""
    shape = dense(32, 4096, 128256, 2 * 8 * 128)
    budgets = [Budget(20 * GB, 60 * GB, kv_host_memory=20 * GB)]
    plan = plan_of(shape, budgets, replace(GPU, host_gbps=4.0))
    assert plan.host_pages > 0 == plan.prediction.guests
    assert plan.kv_ring_pages == plan.memory[0].kv_ring == 0


def test_as_many_are_planned_as_are_asked_for() -> None:
    """As a benchmark does: four times what the device holds, though fewer might be faster."""
    choices = Choices(resident_layers=0, max_sequences=512)
    alone = plan_of(LLAMA_70B, [Budget(24 * GB, 50 * GB)], workload=Workload(768), choices=choices)
    held = alone.num_pages // 12
    wanted = 4 * held
    budgets = [Budget(24 * GB, 200 * GB, kv_host_memory=150 * GB)]
    choices = replace(choices, max_sequences=wanted)
    workload = Workload(768, min_sequences=wanted)
    plan = plan_of(LLAMA_70B, budgets, workload=workload, choices=choices)
    assert plan.prediction.sequences == wanted
    assert 2 * held < plan.prediction.guests < wanted


def test_a_split_model_has_guests_too() -> None:
    plan = plan_of(QWEN3_235B, [Budget(24 * GB, 60 * GB, kv_host_memory=30 * GB)])
    assert plan.expert_slots and plan.prediction.guests > 0


LONG = Workload(8192)


def windowed(window: int | None, profile: DeviceProfile = GPU, **more: int) -> Plan:
    room = {"kv_host_memory": 8 * GB, "kv_disk": 1000 * GB} | more
    choices = Choices(kv_hot_window=window)
    return plan_of(LLAMA_70B, [Budget(24 * GB, 64 * GB, **room)], profile, LONG, choices)


def test_old_pages_on_nvme_let_more_sequences_decode() -> None:
    """The drive is idle while layers come from host RAM, and host RAM has pages of few sequences."""
    without, plan = windowed(None), windowed(1024)
    found, before = plan.prediction, without.prediction
    assert without.window_pages == without.memory[0].host_window == 0 == before.sunk_pages
    assert found.tokens_per_second > 1.2 * before.tokens_per_second
    assert found.guests > before.guests and plan.hot_window == 1024
    assert found.sunk_pages <= plan.window_pages <= found.guests * (8191 - 1024) // 64
    assert found.cold_pages == found.guests * 127
    page = 80 * 64 * 8 * 128 * 2 * 2
    assert found.sunk_bytes == found.sunk_pages * page
    assert found.sunk_seconds == pytest.approx(found.sunk_bytes / 7e9)
    assert plan.nvme_pages == (1000 * GB - plan.window_pages * page) // page
    assert plan.memory[0].host_window > 2 * plan.kv_ring_pages * page // 80


def test_a_slow_drive_is_not_read_for_each_token() -> None:
    slow = windowed(1024, replace(GPU, nvme_gbps=0.3))
    assert slow.window_pages == slow.hot_window == slow.prediction.sunk_pages == 0
    assert windowed(8192).window_pages == 0, "no page of the context is old"


def test_half_of_the_drive_s_room_is_for_pages_that_are_decoded_over() -> None:
    page = 80 * 64 * 8 * 128 * 2 * 2
    plan = windowed(1024, kv_disk=1000 * page)
    assert 0 < plan.prediction.sunk_pages <= plan.window_pages <= 500
    assert windowed(1024, kv_disk=0).window_pages == 0
    with pytest.raises(DoesNotFitError, match="--kv-hot-window must be at least 0, not -1"):
        windowed(-1)


def test_drives_that_stream_weights_too_are_shared_with_pages() -> None:
    """A simulated round is no shorter than the drive needs for both."""
    budgets = [Budget(24 * GB, 10 * GB, kv_host_memory=8 * GB, kv_disk=1000 * GB)] * 2
    choices = Choices(kv_hot_window=0)
    workload = Workload(8192, min_sequences=30)
    plan = plan_of(LLAMA_70B, budgets, workload=workload, choices=choices)
    found = plan.prediction
    assert found.sunk_pages > 0 and max(plan.nvme_bytes_a_pass) > 0
    weights = plan.passes_in_flight * max(plan.nvme_bytes_a_pass) / 7e9
    assert found.terms["nvme"] == pytest.approx(weights + found.sunk_seconds)
