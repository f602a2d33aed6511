import pytest

from headrace.cluster.bench.bounds import Bound, decode_bound, prefill_bound
from headrace.scheduler.inputs import Budget, Choices, DeviceProfile, ModelShape, Workload
from headrace.scheduler.placement import Plan
from headrace.scheduler.planner import make_plan

SPEEDS = DeviceProfile("cuda", 2.0, 50.0, 100.0, 1000.0, 1e-4, 10.0)
LAYER = 50_003_968
SHAPE = ModelShape(
    layer_bytes=(LAYER,) * 4,
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


def test_no_share_of_a_bound_that_was_beaten() -> None:
    bound = Bound({"nvme": 1.0, "compute": 0.5})
    assert bound.share(2.0) == 0.5
    assert bound.share(0.99) == pytest.approx(1.0, abs=0.02)
    assert bound.share(0.8) is None
