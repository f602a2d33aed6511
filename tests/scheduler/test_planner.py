import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_checks import check

from headrace.scheduler.errors import DoesNotFitError
from headrace.scheduler.memory import GRAPH_LAYER_BYTES
from headrace.scheduler.placement import Plan, Tier
from headrace.scheduler.planner import (
    Budget,
    Choices,
    DeviceProfile,
    ModelShape,
    Workload,
    make_plan,
)
from headrace.scheduler.sizes import UNITS, format_size

GB = 10**9
GPU = DeviceProfile("cuda", 7.0, 24.0, 100.0, 1000.0, 2e-4, 10.0)
CPU = DeviceProfile("cpu", 1.5, 8.0, 0.05, 20.0, 3e-4, 4.8)


def dense(
    layers: int,
    hidden: int,
    intermediate: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    *,
    bits: float = 4.5,
    element: int = 2,
    context: int = 131072,
) -> ModelShape:
    """A llama-like model whose query heads take the hidden size."""
    parameters = 2 * hidden**2 + 2 * hidden * kv_heads * head_dim + 3 * hidden * intermediate
    block = int(parameters * bits / 8) // 4096 * 4096 + 4096
    return ModelShape(
        layer_bytes=(block,) * layers,
        kv_format="bf16",
        layer_kv_bytes=(64 * kv_heads * head_dim * 2 * element,) * layers,
        layer_parameters=(parameters,) * layers,
        layer_active_parameters=(parameters,) * layers,
        largest_matrix=hidden * intermediate,
        embed_bytes=vocab * hidden * element,
        head_bytes=vocab * hidden * element,
        hidden_size=hidden,
        vocab_size=vocab,
        intermediate_size=intermediate,
        max_context=context,
        compute_bytes=element,
        needs_scratch=bits < 8 * element,
    )


LLAMA_70B = dense(80, 8192, 28672, 8, 128, 128256)
LLAMA_405B = dense(126, 16384, 53248, 8, 128, 128256)
LLAMA_8B_BF16 = dense(32, 4096, 14336, 8, 128, 128256, bits=16)
TINY = dense(8, 64, 192, 2, 16, 512, bits=32, element=4, context=512)


def plan_of(
    shape: ModelShape,
    stages: int,
    device: float,
    host: float = 0,
    profile: DeviceProfile = GPU,
    context: int = 1024,
    max_sequences: int | None = None,
    **choices: int | str | tuple[int, ...] | None,
) -> Plan:
    plan = make_plan(
        shape,
        [profile] * stages,
        [Budget(int(device), int(host))] * stages,
        Workload(context, max_sequences),
        Choices(**choices),  # type: ignore[arg-type]
    )
    check(plan, shape, [Budget(int(device), int(host))] * stages)
    return plan


def test_what_fits_is_a_pipeline_of_resident_blocks() -> None:
    plan = plan_of(LLAMA_70B, 4, 24 * GB)
    assert set(plan.placement.tiers) == {Tier.DEVICE}
    assert [visit.stage for visit in plan.placement.visits] == [0, 1, 2, 3]
    assert plan.passes_in_flight == 4 and plan.micro_batches == 1
    assert plan.ring_slots == (0, 0, 0, 0) and plan.slot_bytes == 0


def test_one_resident_stage_is_one_visit() -> None:
    plan = plan_of(LLAMA_8B_BF16, 1, 24 * GB)
    assert len(plan.placement.visits) == 1 and plan.passes_in_flight == 1
    assert plan.prediction.terms["hops"] == 0
    assert plan.ahead == 1  # a pass takes milliseconds, and so does the way through the driver


def test_streaming_goes_round_in_one_convoy() -> None:
    plan = plan_of(LLAMA_405B, 4, 24 * GB, stage_layers=(32, 32, 31, 31))
    stages = [visit.stage for visit in plan.placement.visits]
    assert all(a != b for a, b in pairwise(stages))
    assert plan.passes_in_flight == 1 and plan.micro_batches >= 4
    assert plan.prediction.bound_by == "nvme"
    seconds = sum(plan.nvme_bytes_a_pass) / (4 * 7e9)  # evenly over four drives
    assert plan.prediction.pass_seconds == pytest.approx(seconds, rel=0.1)
    assert plan.prediction.pass_seconds == max(plan.nvme_bytes_a_pass) / 7e9
    assert plan.ahead == 0  # seconds, through which a new request would wait twice


def test_cyclic_beats_contiguous_groups_by_the_number_of_stages() -> None:
    cyclic = plan_of(LLAMA_405B, 4, 24 * GB)
    groups = plan_of(LLAMA_405B, 4, 24 * GB, placement="contiguous")
    assert groups.passes_in_flight == 4
    rates = [plan.prediction.tokens_per_second for plan in (cyclic, groups)]
    assert rates[0] / rates[1] == pytest.approx(4, rel=0.15)


def test_host_memory_takes_layers_off_the_drives() -> None:
    cold = plan_of(LLAMA_70B, 1, 24 * GB)
    warm = plan_of(LLAMA_70B, 1, 24 * GB, 20 * GB)
    host = [i for i, tier in enumerate(warm.placement.tiers) if tier is Tier.HOST]
    assert not any(cold.host_bytes_a_pass)
    assert warm.memory[0].host_layers > 19 * GB
    assert max(b - a for a, b in pairwise(host)) <= 3  # spread, with resident layers between
    assert warm.prediction.tokens_per_second > 1.9 * cold.prediction.tokens_per_second


def test_pages_go_before_resident_layers_only_as_far_as_the_workload_wants() -> None:
    many = plan_of(LLAMA_70B, 1, 24 * GB)
    few = plan_of(LLAMA_70B, 1, 24 * GB, max_sequences=4)
    assert many.placement.tiers.count(Tier.DEVICE) == 0
    assert few.placement.tiers.count(Tier.DEVICE) > 20
    assert few.num_pages == 4 * 16 and few.prediction.sequences == 4


def test_a_resident_model_has_pages_beyond_what_a_slow_processor_could_use() -> None:
    """Memory that has no other use; and the processor may be faster than when it was measured."""
    tiny = dense(12, 256, 1024, 4, 64, 4096, element=4, context=1024)
    slow = replace(CPU, tflops=0.001)
    budgets, choices = [Budget(2 * GB, 0)], Choices(max_sequences=32)
    plan = make_plan(tiny, [slow], budgets, Workload(256), choices)
    assert plan.prediction.bound_by == "compute"
    assert plan.prediction.sequences == 32


def test_resident_layers_are_spread_evenly() -> None:
    tiers = plan_of(LLAMA_70B, 1, 24 * GB, max_sequences=4).placement.tiers
    resident = [i for i, tier in enumerate(tiers) if tier is Tier.DEVICE]
    gaps = [b - a for a, b in pairwise(resident)]
    assert max(gaps) - min(gaps) <= 1


def test_uneven_budgets_share_one_page_count() -> None:
    budgets = [Budget(24 * GB, 0), Budget(16 * GB, 8 * GB), Budget(12 * GB, 0)]
    plan = make_plan(LLAMA_70B, [GPU] * 3, budgets, Workload(1024))
    check(plan, LLAMA_70B, budgets)
    assert plan.memory[0].resident > plan.memory[2].resident


def test_of_an_even_split_the_slowest_drive_binds() -> None:
    slow = replace(GPU, nvme_gbps=1.0)
    choices = Choices(stage_layers=(40, 40))
    plan = make_plan(LLAMA_70B, [GPU, slow], [Budget(8 * GB, 0)] * 2, Workload(1024), choices)
    assert plan.prediction.terms["nvme"] == pytest.approx(plan.nvme_bytes_a_pass[1] / 1e9)


def test_a_drive_feeds_a_cpu_without_a_copy() -> None:
    plan = plan_of(TINY, 1, 1.5e6, profile=CPU, context=128)
    assert plan.nvme_bytes_a_pass[0] > 0 and plan.prediction.terms["pcie"] == 0


def test_small_budgets_shrink_the_pass() -> None:
    large = plan_of(TINY, 2, 100e6, profile=CPU, context=128)
    small = plan_of(TINY, 2, 1.0e6, profile=CPU, context=128)
    assert large.token_budget == 512
    assert 64 <= small.token_budget < 512


def test_choices_are_kept() -> None:
    plan = plan_of(
        LLAMA_70B,
        2,
        12 * GB,
        placement="cyclic",
        token_budget=1000,
        max_sequences=9,
        micro_batches=3,
    )
    assert (plan.token_budget, plan.max_sequences, plan.micro_batches) == (1000, 9, 3)
    resident = plan_of(TINY, 2, 100e6, profile=CPU, placement="cyclic")
    assert set(resident.placement.tiers) == {Tier.DEVICE}
    assert [visit.stage for visit in resident.placement.visits] == [0, 1, 0, 1] * 2


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("placement", ["auto", "contiguous"])
def test_as_many_layers_stay_as_were_asked_for(stages: int, placement: str) -> None:
    layers = 80 // stages
    for wanted, kept in ((0, 0), (3, 3), (layers, layers), (1000, layers)):
        plan = plan_of(
            LLAMA_70B, stages, 140 * GB, 100 * GB, placement=placement, resident_layers=wanted
        )
        for stage in range(stages):
            tiers = [plan.placement.tiers[i] for i in plan.placement.layers_of(stage)]
            assert tiers.count(Tier.DEVICE) == kept
            assert tiers.count(Tier.HOST) == layers - kept  # there is room for them in host memory


def test_asking_for_more_resident_layers_than_fit_is_refused() -> None:
    plan_of(LLAMA_70B, 1, 24 * GB, resident_layers=20)
    message = refused(LLAMA_70B, 1, 24 * GB, resident_layers=60)
    assert "no --resident-layers 60" in message
    assert "at least 0" in refused(LLAMA_70B, 1, 24 * GB, resident_layers=-1)


def test_context_is_what_the_model_allows_and_the_pages_hold() -> None:
    assert plan_of(TINY, 1, 100e6, profile=CPU, context=4096).max_context == 512
    plan = plan_of(LLAMA_70B, 1, 24 * GB, context=1024, max_sequences=2)
    assert plan.max_context == plan.num_pages * 64 == 2048


def test_mixture_reads_only_the_experts_it_hits() -> None:
    shape = replace(TINY, layer_active_parameters=tuple(p // 8 for p in TINY.layer_parameters))
    one, dense_one = (
        plan_of(x, 1, 100e6, profile=CPU, context=64, max_sequences=1).prediction.terms
        for x in (shape, TINY)
    )
    assert one["hbm"] < dense_one["hbm"] / 2 and one["compute"] < dense_one["compute"] / 2


def parse(text: str) -> int:
    number, unit = text.split()
    return int(float(number) * 1024 ** UNITS.index(unit)) + 1


def refused(shape: ModelShape, stages: int, device: float, **options: object) -> str:
    with pytest.raises(DoesNotFitError) as caught:
        plan_of(shape, stages, device, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_refusal_names_the_stage_the_amounts_and_three_ways_out() -> None:
    message = refused(TINY, 2, 0.5e6, profile=CPU, context=256)
    assert re.search(
        r"stage 1 of 2 needs at least \d+ KiB of device memory and has 488 KiB", message
    )
    for row in ("head", "ring", "activations", "KV pages", "in all"):
        assert re.search(rf"^  {row} +[\d.]+ [KM]iB", message, re.MULTILINE), row
    assert len(re.findall(r"^  - ", message, re.MULTILINE)) >= 3
    assert "nf4" in message and "--stages" in message and "--context" in message


@pytest.mark.parametrize(
    ("shape", "stages", "device", "profile"),
    [
        (TINY, 1, 0.4e6, CPU),
        (TINY, 2, 0.5e6, CPU),
        (LLAMA_8B_BF16, 1, 1.5e9, GPU),
        (LLAMA_70B, 4, 2e9, GPU),
        (LLAMA_405B, 1, 6e9, GPU),
    ],
)
def test_the_ways_out_are_ways_out(
    shape: ModelShape, stages: int, device: float, profile: DeviceProfile
) -> None:
    message = refused(shape, stages, device, profile=profile, context=512)
    size = re.search(r"--device-memory at least ([\d.]+ \wiB)", message)
    assert size is not None
    plan_of(shape, stages, parse(size[1]), profile=profile, context=512)
    needed = re.search(r"needs at least ([\d.]+ \wiB)", message)
    assert needed is not None
    refused(shape, stages, parse(needed[1]) * 0.98, profile=profile, context=512)
    if more := re.search(r"--stages (\d+): needs [^:]+: fits", message):
        plan_of(shape, int(more[1]), device, profile=profile, context=512)
    if shorter := re.search(r"--context (\d+): needs [^:]+: fits", message):
        plan_of(shape, stages, device, profile=profile, context=int(shorter[1]))


def test_a_token_budget_that_is_too_large_is_one_of_the_ways_out() -> None:
    message = refused(TINY, 1, 2e6, profile=CPU, context=64, token_budget=4096)
    assert "no --token-budget 4096" in message and "fits" in message


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"token_budget": 0}, "--token-budget must be at least 1, not 0"),
        ({"placement": "round"}, "--placement round is none of auto, cyclic, contiguous"),
        ({"token_budget": 4, "micro_batches": 8}, "--micro-batches 8 cannot share"),
    ],
)
def test_impossible_choices(choices: dict[str, int | str], message: str) -> None:
    assert message in refused(TINY, 2, 1e8, **choices)


def test_more_stages_than_layers() -> None:
    assert "--stages 9 cannot share 8 layers: use --stages 8" in refused(TINY, 9, 1e8)


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    layers = draw(st.integers(1, 24))
    blocks = draw(st.lists(st.integers(1, 60), min_size=layers, max_size=layers))
    pages = draw(st.lists(st.integers(1, 20), min_size=layers, max_size=layers))
    tails = draw(st.lists(st.integers(1, 40), min_size=layers, max_size=layers) | st.just([]))
    return replace(
        TINY,
        layer_tail_bytes=tuple(512 * n for n in tails),
        layer_bytes=tuple(4096 * n for n in blocks),
        layer_kv_bytes=tuple(512 * n for n in pages),
        layer_parameters=tuple(1024 * n for n in blocks),
        layer_active_parameters=tuple(512 * n for n in blocks),
        needs_scratch=draw(st.booleans()),
    )


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes(),
    budgets=st.lists(
        st.builds(
            Budget,
            st.integers(10**5, 10**7),
            st.integers(0, 10**6),
            kv_host_memory=st.sampled_from([0, 0, 10**5]),
        ),
        min_size=1,
        max_size=4,
    ),
    profile=st.sampled_from([CPU, GPU]),
    context=st.integers(1, 600),
    max_sequences=st.none() | st.integers(1, 40),
    placement=st.sampled_from(["auto", "cyclic", "contiguous"]),
    micro_batches=st.none() | st.integers(1, 5),
    token_budget=st.none() | st.integers(5, 600),
)
def test_every_plan_keeps_every_budget(
    shape: ModelShape,
    budgets: list[Budget],
    profile: DeviceProfile,
    context: int,
    max_sequences: int | None,
    placement: str,
    micro_batches: int | None,
    token_budget: int | None,
) -> None:
    choices = Choices(placement, token_budget, None, micro_batches)
    workload = Workload(context, max_sequences)
    try:
        plan = make_plan(shape, [profile] * len(budgets), budgets, workload, choices)
    except DoesNotFitError as error:
        assert re.search(r"\d", str(error))
        return
    check(plan, shape, budgets)
    assert plan.num_pages * 64 >= min(context, shape.max_context)


def test_graphs_are_made_on_cuda_where_they_are_small() -> None:
    plan = plan_of(LLAMA_8B_BF16, 1, 80 * GB)
    assert plan.graph_rows == 512 and plan.graph_lanes == 16
    (memory,) = plan.memory
    assert memory.graphs == 16 * (33 * GRAPH_LAYER_BYTES + 3 * 512 * 4096 * 2)
    assert plan_of(LLAMA_8B_BF16, 1, 20 * GB).graph_lanes < 16
    stages = plan_of(LLAMA_8B_BF16, 2, 40 * GB)
    assert [m.graphs for m in stages.memory] == [
        16 * (17 * GRAPH_LAYER_BYTES + 3 * 512 * 4096 * 2)
    ] * 2
    for none in (
        plan_of(LLAMA_8B_BF16, 1, 80 * GB, graphs=False),
        plan_of(LLAMA_8B_BF16, 1, 2.09 * GB),
        plan_of(TINY, 1, 80 * GB, profile=CPU),
    ):
        assert none.graph_rows == none.graph_lanes == none.memory[0].graphs == 0


def test_graphs_of_mixtures_keep_what_experts_read_and_write() -> None:
    active = tuple(n // 4 for n in LLAMA_8B_BF16.layer_active_parameters)
    mixture = replace(LLAMA_8B_BF16, layer_active_parameters=active)
    (memory,) = plan_of(mixture, 1, 80 * GB).memory
    assert memory.graphs == 16 * (33 * GRAPH_LAYER_BYTES + 5 * 512 * 4096 * 2)


def test_graphs_that_were_asked_for_are_made_or_refused() -> None:
    few = plan_of(LLAMA_8B_BF16, 1, 2.4 * GB, graphs=True, micro_batches=1)
    assert few.graph_rows > 0 and few.graph_lanes == 1 and few.memory[0].graphs > 0
    message = refused(LLAMA_8B_BF16, 1, 1.5 * GB, graphs=True)
    assert re.search(r"^  graphs +[\d.]+ MiB", message, re.MULTILINE) and "--no-graphs" in message


def test_shared_hosts() -> None:
    assert GPU.shared_by(2) == replace(GPU, nvme_gbps=3.5)
    assert CPU.shared_by(2).tflops == CPU.tflops / 2


def test_format_size() -> None:
    assert [format_size(n) for n in (0, 1023, 1024, 5 << 20, 24 * GB)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "5.00 MiB",
        "22.4 GiB",
    ]
    assert format_size((5 << 20) + 1, up=True) == "5.01 MiB"
