"""What is asked for with --kv-host-memory is what stages have."""

from pathlib import Path

import pytest

from headrace.cluster.bench.local import InlinePipeline, local_engine
from headrace.cluster.cli.main import main
from headrace.cluster.cli.options import Device, KVFormat, RunOptions
from headrace.cluster.discovery import Discovery
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.run_plan import budgets
from headrace.runtime.stage import Stage
from headrace.scheduler.inputs import DeviceProfile
from headrace.scheduler.request import SamplingParams

GIB = 1 << 30
CPU = DeviceProfile("cpu", 1.5, 8.0, 0.05, 20.0, 3e-4, 4.8)


@pytest.mark.parametrize("kv_format", ["auto", "int4"])
def test_a_stage_has_the_slots_of_the_plan(stories: Path, kv_format: str) -> None:
    stages: list[Stage] = []

    def inline(stage: Stage) -> InlinePipeline:
        stages.append(stage)
        return InlinePipeline(stage)

    run = RunOptions(
        device=Device.CPU,
        device_memory="60MiB",
        kv_host_memory="3MiB",
        kv_format=KVFormat(kv_format),
        context=256,
    )
    with local_engine(run.engine(stories), inline) as engine:
        plan = engine.plan
        (stage,) = stages
        assert stage._moves is not None
        host = stage._moves._host
        assert plan.host_pages == (3 << 20) // host.slot_bytes > 0
        assert plan.memory[0].host_kv == plan.host_pages * host.slot_bytes
        assert len(host.slot(plan.host_pages - 1)) == host.slot_bytes
        engine.wait_host_tier()
        engine.add([5, 6, 7], SamplingParams(max_tokens=3), seed=0)
        while engine.has_work:
            engine.step()


def test_the_command_line_shows_it(
    stories: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = ["--device", "cpu", "--device-memory", "60MiB", "--kv-host-memory", "3MiB"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(stories), *options])
    assert not ended.value.code
    said = " ".join(capsys.readouterr().out.split())
    assert "more pages have room in host memory" in said and "KV pages in host memory" in said


def found(node: str, host_free: int) -> Discovery:
    return Discovery(
        node=node, profile=CPU, cores=4, host_free=host_free, device_free=10 * GIB, process=0
    )


def test_it_is_taken_from_what_weights_would_have() -> None:
    nodes = [found("a", 16 * GIB), found("a", 16 * GIB), found("b", 16 * GIB)]
    options = EngineOptions(Path(), kv_host_memory=3 * GIB)
    cpu, cuda = (budgets(options, device, nodes) for device in ("cpu", "cuda"))
    # A stage on a CPU computes in the same memory.
    assert [budget.device_memory for budget in cpu] == [GIB, GIB, 5 * GIB]
    assert [budget.host_memory for budget in cpu] == [3 * GIB] * 3
    assert [budget.host_weights for budget in cpu] == [0] * 3
    assert [budget.host_memory for budget in cuda] == [4 * GIB, 4 * GIB, 8 * GIB]
    assert [budget.host_weights for budget in cuda] == [GIB, GIB, 5 * GIB]


def test_more_than_is_free_is_not_taken_by_itself() -> None:
    options = EngineOptions(Path(), kv_host_memory=20 * GIB)
    (budget,) = budgets(options, "cpu", [found("a", 16 * GIB)])
    assert budget.host_memory == 8 * GIB < budget.kv_host_memory  # which the planner refuses
