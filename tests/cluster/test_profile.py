"""Memory of real runs, planned, held and measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import headrace

from headrace.cluster.bench.local import local_engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.profile.account import device_account, host_account
from headrace.runtime.memory.held import parts_of
from headrace.runtime.memory.message import DeviceMemory, Measured, Part
from headrace.runtime.memory.process import Malloc, ProcessMemory
from headrace.scheduler.placement import StageMemory

MIB = 1 << 20
PLANNED = (
    "resident",
    "ring",
    "head",
    "kv",
    "kv_ring",
    "tails",
    "scratch",
    "host_layers",
    "host_kv",
    "embed",
)
"""Those parts of a plan that are tensors, so that not one byte may be different."""


@pytest.mark.parametrize(
    "chosen",
    [
        {"device_memory": 64 * MIB},
        {"device_memory": 8 * MIB, "host_memory": 2 * MIB, "context": 256, "dtype": "bfloat16"},
        {
            "device_memory": 9 * MIB,
            "host_memory": 24 * MIB,
            "kv_host_memory": 16 * MIB,
            "kv_format": "int8",
            "context": 256,
        },
    ],
    ids=["resident", "streamed", "quantized"],
)
def test_a_stage_holds_what_its_plan_says(stories: Path, chosen: dict[str, int]) -> None:
    options = EngineOptions(stories, device="cpu", **chosen)  # type: ignore[arg-type]
    with local_engine(options) as engine:
        engine.wait_host_tier()
        ring: Any = engine._pipeline
        [stage] = ring._pipeline._stages
        held = {part.name: part.nbytes for part in parts_of(stage.memory())}
        [memory] = engine.plan.memory
    assert {name: held.get(name, 0) for name in PLANNED} == {
        name: getattr(memory, name) for name in PLANNED
    }
    assert held.keys() <= {*PLANNED, "buffers", "readers"}


def process(anonymous: int, peak: int, files: int = 0) -> ProcessMemory:
    rss = anonymous + files
    return ProcessMemory(
        1, "vm", rss, rss, rss, 0, peak, anonymous, (), (), 3, 2, 5, Malloc(0, 0, 0)
    )


def test_an_account_of_a_cpu_adds_up_and_names_what_is_left() -> None:
    start = Measured(process(102, 0))
    last = Measured(process(162, 200), (Part("kv", 50, 40), Part("sent", 8, 8)))
    planned = StageMemory(*[0] * 9)
    account = host_account(
        "stage 0", [("start", start)], last, replace(planned, kv=50, activations=30, process=110)
    )
    lines = {line.name: line for line in account.lines}
    assert (lines["KV pages"].planned, lines["KV pages"].held, lines["KV pages"].measured) == (
        50,
        50,
        40,
    )
    assert lines["start"].measured == 100  # without its stacks
    assert account.unexplained == 162 - 40 - 8 - 2 - 100
    assert lines["what passes need at their peak"].measured == 200 - 162 - 5
    assert lines["activations"].measured == 33 + 8
    assert (
        account.total
        == 200
        == sum(line.measured or 0 for line in account.lines if line.group != "sum")
    )
    assert not account.is_explained


@pytest.mark.parametrize("nvml", [1300, None])
def test_an_account_of_a_gpu_adds_up(nvml: int | None) -> None:
    device = DeviceMemory(
        "H200", 610, 1000, 800, 1000, 100, nvml, "" if nvml else "no such process"
    )
    parts = Part("kv", 500, 0, True), Part("resident", 100, 0, True), Part("embed", 70, 70)
    planned = replace(StageMemory(*[0] * 9), kv=500, resident=100, activations=180)
    account = device_account("stage 0", Measured(process(1, 1), parts, device), planned)
    assert account is not None
    lines = {line.name: line.measured for line in account.lines}
    assert lines["activations"] == 190
    assert lines["kept by torch's allocator"] == 1000 - 800 - 100
    assert (account.unexplained, account.total) == (10, nvml or 1000)
    assert account.total == sum(line.measured or 0 for line in account.lines if line.group != "sum")
    assert ("no such process" in account.total_is) == (nvml is None)


@pytest.mark.slow
def test_a_run_is_explained(stories: Path, tmp_path: Path) -> None:
    """Two stages that stream, with quantized pages that go to host memory; each a process, as users run it."""
    options = {
        "device": "cpu",
        "stages": 2,
        "device-memory": "6MiB",
        "host-memory": "9MiB",
        "context": 256,
        "kv-format": "int8",
        "kv-host-memory": "8MiB",
        "sequences": 4,
        "seconds": 20,
    }
    given = [word for name, value in options.items() for word in (f"--{name}", value)]
    with headrace(tmp_path, "profile", stories, *given, "--json") as command:
        code = command.wait(170)
        assert code == 0, command.stderr + command.stdout
        found = json.loads(command.stdout)
    assert found["explained"] and found["load"]["requests"] == 4
    titles = [account["title"] for account in found["accounts"]]
    assert titles == ["driver", "stage 0, host", "stage 1, host"]
    for account in found["accounts"]:
        lines = [line for line in account["lines"] if line["group"] != "sum"]
        assert sum(line["measured"] or 0 for line in lines) == account["total"]
        assert abs(account["unexplained"]) < account["total"] / 20
    for account in found["accounts"][1:]:
        lines = {line["name"]: line for line in account["lines"]}
        for line in lines.values():
            if line["planned"] is not None and line["held"] is not None:
                assert line["planned"] == line["held"], line
        assert lines["KV pages in host memory"]["held"] > 0
        # Its figure has some room: a plan that promises less than a process takes is a broken one.
        own = lines["the process itself"]
        assert own["measured"] < own["planned"] < 1.3 * own["measured"]
    assert {one["name"] for one in found["processes"]} > {"driver", "stage 0", "stage 1"}
