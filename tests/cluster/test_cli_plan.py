import io
import json
from dataclasses import replace

import pytest
from mixtures import QWEN3_235B
from rich.console import Console

from headrace.cluster.cli.plan import layer_ranges, plan_json, render_plan
from headrace.cluster.cli.sizes import format_size, parse_size
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.inputs import Budget, DeviceProfile, ModelShape, Workload
from headrace.scheduler.placement import Plan
from headrace.scheduler.planner import make_plan

CPU = DeviceProfile("cpu", 1.5, 8.0, 0.05, 20.0, 3e-4, 4.8)
SHAPE = ModelShape(
    layer_bytes=(200704,) * 8,
    kv_format="bf16",
    layer_kv_bytes=(16384,) * 8,
    layer_parameters=(49152,) * 8,
    layer_active_parameters=(49152,) * 8,
    largest_matrix=12288,
    embed_bytes=131072,
    head_bytes=131072,
    hidden_size=64,
    vocab_size=512,
    intermediate_size=192,
    max_context=512,
    compute_bytes=4,
    needs_scratch=False,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4MiB", 4 << 20),
        ("600MB", 600_000_000),
        ("10GiB", 10 << 30),
        ("0", 0),
        ("1.5 gib", 3 << 29),
        ("5.21 MiB", int(5.21 * (1 << 20))),
        ("900 KiB", 900 << 10),
        ("123", 123),
        ("2tb", 2 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "4 parsecs", "1e9", "4M", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(HeadraceError, match="is not a size: write 600MB"):
        parse_size(text)


@pytest.mark.parametrize("size", [1, 1023, 1024, 10_239_999, 2**40 - 1, 3**30, 2**60])
def test_a_size_shown_upwards_is_enough_when_typed_in(size: int) -> None:
    assert parse_size(format_size(size, up=True)) >= size


def test_layer_ranges() -> None:
    assert layer_ranges((0,)) == "0"
    assert layer_ranges((4, 5, 6, 7)) == "4-7"
    assert layer_ranges((0, 4, 8, 12)) == "0, 4, ..., 12"


def plan_of(stages: int, device_memory: int, host_memory: int = 0) -> Plan:
    budgets = [Budget(device_memory, host_memory, 5 << 20)] * stages
    return make_plan(SHAPE, [CPU] * stages, budgets, Workload(context=64))


def printed(plan: Plan, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(render_plan(plan))
    return stream.getvalue()


@pytest.mark.parametrize("memory", [1_200_000, 100_000_000])
@pytest.mark.parametrize("stages", [1, 2, 8])
def test_render_in_80_columns(memory: int, stages: int) -> None:
    plan = plan_of(stages, memory, 300_000)
    text = printed(plan)
    for word in ("Stages", "Memory", "predicted", "tokens/s", "bound by", "activations", "process"):
        assert word in text
    assert f"{plan.prediction.expected_rate:.1f}" in text
    assert format_size(sum(plan.nvme_bytes_a_pass)) in text
    assert "\u2026" not in text  # nothing is cut
    assert ("least" in text) == (stages > 6)
    for memory_of_stage in plan.memory[:6] if stages <= 6 else ():
        assert format_size(memory_of_stage.device) in text


def test_the_kv_format_is_shown_and_so_are_tails() -> None:
    assert "pages of 64 tokens in bf16" in " ".join(printed(plan_of(1, 100_000_000)).split())
    shape = replace(SHAPE, kv_format="int4", layer_tail_bytes=(40000,) * 8)
    plan = make_plan(shape, [CPU], [Budget(100_000_000, 0)], Workload(context=64))
    text = printed(plan)
    assert "pages of 64 tokens in int4" in " ".join(text.split())
    assert "newest KV pages, as computed" in text
    assert format_size(plan.num_tails * 8 * 40000) in text
    assert json.loads(json.dumps(plan_json(plan)))["kv_format"] == "int4"


def test_kv_pages_in_host_memory_are_shown() -> None:
    budgets = [Budget(100_000_000, 3 << 20, kv_host_memory=2 << 20)] * 2
    plan = make_plan(SHAPE, [CPU] * 2, budgets, Workload(context=64))
    assert plan.host_pages == 32
    text = printed(plan)
    assert "32 more pages have room in host memory" in " ".join(text.split())
    assert "KV pages in host memory" in text and "2.00 MiB" in text
    data = json.loads(json.dumps(plan_json(plan)))
    assert data["host_pages"] == 32 and data["memory"][1]["host_kv"] == 2 << 20
    assert "KV pages in host memory" not in printed(plan_of(2, 100_000_000))


@pytest.mark.parametrize("stages", [1, 3, 8])
def test_experts_in_80_columns(stages: int) -> None:
    device = DeviceProfile("cuda", 7.0, 24.0, 100.0, 1000.0, 2e-4, 10.0)
    budgets = [Budget((10 + i) << 30, 8 << 30) for i in range(stages)]
    plan = make_plan(QWEN3_235B, [device] * stages, budgets, Workload(1024, 4))
    text = printed(plan)
    words = " ".join(text.split())
    assert "\u2026" not in text
    assert "layers resident without their experts" in words
    assert "slots for experts" in words and "experts in host memory" in words
    least, most = min(plan.expert_slots), max(plan.expert_slots)
    counts = f"{most}" if stages == 1 else f"{least} to {most}"
    assert f"experts {counts} slots of 10.1 MiB on a device" in words
    traffic = plan.prediction.experts
    assert traffic is not None
    assert f"reaches {traffic.reached:,.0f} and loads {traffic.loaded:,.0f} of them" in words
    assert f"{format_size(round(traffic.nvme_bytes))} from NVMe" in words
    data = json.loads(json.dumps(plan_json(plan)))
    assert data["expert_slots"] == list(plan.expert_slots)
    assert data["prediction"]["experts"]["loaded"] == traffic.loaded
    assert data["memory"][0]["experts"] == plan.expert_slots[0] * plan.expert_slot_bytes


def test_json_round_trip() -> None:
    plan = plan_of(2, 1_200_000)
    data = json.loads(json.dumps(plan_json(plan)))
    assert data["placement"]["tiers"] == [tier.value for tier in plan.placement.tiers]
    assert data["placement"]["kind"] in ("cyclic", "contiguous")
    assert data["memory"][0]["device"] == plan.memory[0].device
    assert data["prediction"]["tokens_per_second"] == plan.prediction.tokens_per_second
    assert data["num_pages"] == plan.num_pages
    assert data["prediction"]["experts"] is None
    assert "expert" not in printed(plan)
