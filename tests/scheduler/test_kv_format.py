"""KV formats by name and by size."""

from dataclasses import replace

import pytest

from headrace.scheduler.errors import DoesNotFitError, HeadraceError, UnsupportedModelError
from headrace.scheduler.inputs import Budget, Choices, DeviceProfile, ModelShape, Workload
from headrace.scheduler.kv_format import FORMATS, resolve_kv_format
from headrace.scheduler.placement import Plan
from headrace.scheduler.planner import make_plan

LAYERS, KV_HEADS = 16, 8
GPU = DeviceProfile("cuda", 7.0, 24.0, 100.0, 1000.0, 2e-4, 10.0)


@pytest.mark.parametrize(
    ("name", "dim", "ratio"),
    [("int8", 128, 1.969), ("int4", 128, 3.764), ("int8", 64, 1.939), ("int4", 64, 3.555)],
)
def test_pages_that_fit_where_one_of_bf16_does(name: str, dim: int, ratio: float) -> None:
    """Codes and scales of a page, which is all that there is of it."""
    found = FORMATS["bf16"].page_bytes(8, dim, dim) / FORMATS[name].page_bytes(8, dim, dim)
    assert ratio <= found < ratio + 0.001


def shape_of(name: str, dim: int = 128) -> ModelShape:
    """A small model in bf16 with wide keys and values."""
    fmt, own = FORMATS[name], FORMATS["bf16"].page_bytes(KV_HEADS, dim, dim)
    return ModelShape(
        layer_bytes=(4096,) * LAYERS,
        layer_kv_bytes=(fmt.page_bytes(KV_HEADS, dim, dim),) * LAYERS,
        layer_parameters=(2048,) * LAYERS,
        layer_active_parameters=(2048,) * LAYERS,
        largest_matrix=0,
        embed_bytes=0,
        head_bytes=0,
        hidden_size=32,
        vocab_size=32,
        intermediate_size=32,
        max_context=1 << 20,
        compute_bytes=2,
        needs_scratch=False,
        kv_format=name,
        layer_tail_bytes=(own,) * LAYERS if fmt.is_quantized else (),
    )


def plan_of(shape: ModelShape, memory: int, context: int = 16384) -> Plan:
    wanted = Choices(token_budget=4096, max_sequences=4096, graphs=False)
    return make_plan(
        shape, [GPU], [Budget(memory, 0)], Workload(context, min_sequences=4096), wanted
    )


@pytest.mark.parametrize(("name", "least"), [("int8", 1.9), ("int4", 3.6)])
def test_a_budget_holds_as_many_more_sequences(name: str, least: float) -> None:
    """Their newest pages counted, too, which matters less the longer they are."""
    memory = 64 << 30
    plain, plan = plan_of(shape_of("bf16"), memory), plan_of(shape_of(name), memory)
    assert plan.kv_format == name and plain.num_tails == 0
    assert plan.num_pages >= least * plain.num_pages
    stage = plan.memory[0]
    assert stage.kv == plan.num_pages * LAYERS * shape_of(name).layer_kv_bytes[0]
    assert plan.num_tails == plan.num_pages // 256 == plan.prediction.sequences
    assert stage.tails == plan.num_tails * LAYERS * shape_of(name).layer_tail_bytes[0]
    assert stage.device <= memory


def test_tails_are_refused_like_anything_else() -> None:
    shape = shape_of("int4")
    one = LAYERS * (shape.layer_kv_bytes[0] + shape.layer_tail_bytes[0])
    with pytest.raises(DoesNotFitError, match=r"KV tails +4\.00 MiB  its newest page"):
        plan_of(shape, one, context=64)
    # The same without tails fits.
    plan_of(replace(shape, layer_tail_bytes=()), one, context=64)


@pytest.mark.parametrize(
    ("choice", "dtype", "name"),
    [
        ("auto", "float32", "fp32"),
        ("auto", "float16", "fp16"),
        ("auto", "bfloat16", "bf16"),
        ("bf16", "float32", "bf16"),
        ("int8", "float16", "int8"),
        ("int4", "bfloat16", "int4"),
    ],
)
def test_names(choice: str, dtype: str, name: str) -> None:
    assert resolve_kv_format(choice, dtype).name == name


@pytest.mark.parametrize("choice", ["fp8", "fp32", ""])
def test_what_is_no_format(choice: str) -> None:
    with pytest.raises(HeadraceError, match=f"--kv-format must be .*bf16.*, not '{choice}'"):
        resolve_kv_format(choice, "float32")


@pytest.mark.parametrize("dims", [(24, 24), (40, 64), (8, 8), (64, 15), (64, 18)])
def test_heads_that_int4_has_no_way_with(dims: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedModelError, match="use --kv-format int8"):
        FORMATS["int4"].page_bytes(2, *dims)
    assert FORMATS["int8"].page_bytes(2, *dims) > 0


@pytest.mark.parametrize("dim", [16, 48, 80, 96, 128, 192, 256])
def test_heads_that_int4_rotates_in_blocks(dim: int) -> None:
    assert FORMATS["int4"].page_bytes(1, dim, dim) == 64 * (dim + 8)
