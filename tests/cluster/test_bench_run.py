"""`headrace bench`: shapes that run at CPU size, tables that fit, mistakes that are named."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import headrace
from rich.console import Console, RenderableType
from small_shapes import small_config

from headrace.cluster.bench.machine import Reading, measure_devices, measure_drive
from headrace.cluster.bench.run import (
    Result,
    Work,
    check_request,
    random_store,
    run_profile,
    run_work,
)
from headrace.cluster.cli import bench_tables
from headrace.cluster.cli.main import main
from headrace.cluster.engine_options import EngineOptions
from headrace.scheduler.errors import DoesNotFitError, HeadraceError
from headrace.scheduler.placement import Tier

CPU = EngineOptions(store=Path(), device="cpu", device_memory=200 << 20)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def measured(folder: Path, shape: str, work: Work, given: EngineOptions = CPU) -> Result:
    with random_store(folder, small_config(shape), "nf4", in_memory=False, keep=False) as store:
        return run_work(given, work, store)


def printed(what: RenderableType) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80).print(what)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("shape", "tier"),
    [("8b", "nvme"), ("qwen3-235b", "device"), ("mixtral-8x7b", "host"), ("deepseek-v3", "auto")],
)
def test_a_shape_runs_and_says_what_bound_it(tmp_path: Path, shape: str, tier: str) -> None:
    work = Work(batch=4, prompt=8, new=6, tier=tier, local=True)
    result = measured(tmp_path, shape, work)
    assert not list(tmp_path.iterdir())
    assert result.batch == 4
    assert result.prefill.tokens == 32
    assert result.rounds >= 3
    streamed = [sum(result.plan.nvme_bytes_a_pass), sum(result.plan.host_bytes_a_pass)]
    assert [tier == "nvme", tier == "host"] == [count > 0 for count in streamed]
    for phase in (result.prefill, result.decode):
        assert set(phase.bound.terms) == {"nvme", "pcie", "compute", "hbm", "hops"}
        assert phase.tokens_per_second == phase.tokens / phase.seconds
        assert (phase.bound.terms["nvme"] > 0) == (tier == "nvme")
    text = printed(bench_tables.run_view("a title", work, result))
    for word in ("reading from NVMe", "share of the bound", "tokens/s", "without Ray", "waits"):
        assert word in text
    assert "\u2026" not in text  # nothing is cut
    data = bench_tables.run_json(shape, small_config(shape), "nf4", work, result)
    assert json.loads(json.dumps(data))["decode"]["bound_by"] == result.decode.bound.bound_by


@pytest.mark.slow
def test_more_sequences_than_the_device_holds(tmp_path: Path) -> None:
    """Their pages lie in host memory, and are brought for each token."""
    tight = replace(CPU, device_memory=4 << 20)
    work = Work(batch=40, prompt=200, new=120, tier="host", local=True)
    with pytest.raises(HeadraceError, match=r"KV for \d+ sequences of 200 \+ 120 tokens"):
        measured(tmp_path, "8b", work, tight)
    result = measured(tmp_path, "8b", work, replace(tight, kv_host_memory=8 << 20))
    plan = result.plan
    assert plan.prediction.guests > 20
    assert result.batch == 40 and 36 <= result.decode.tokens <= 40
    (stage,) = result.stages
    assert stage.kv_cold_bytes > 0
    brought = stage.kv_cold_bytes + stage.host_bytes
    assert result.decode.bound.terms["pcie"] == pytest.approx(
        brought / result.profile.host_gbps / 1e9
    )


@pytest.mark.parametrize("shape", ["mixtral-8x7b", "qwen3-235b", "deepseek-v3"])
@pytest.mark.parametrize("tier", ["nvme", pytest.param("host", marks=pytest.mark.slow)])
def test_experts_are_loaded_as_tokens_reach_them(tmp_path: Path, shape: str, tier: str) -> None:
    work = Work(batch=2, prompt=8, new=8, tier=tier, local=True)
    config = small_config(shape) | {"num_hidden_layers": 5}
    with random_store(tmp_path, config, "nf4", in_memory=False, keep=False) as store:
        result = run_work(CPU, work, store)
    plan, decode = result.plan, result.decode
    assert plan.expert_slots[0] > 0
    assert plan.memory[0].experts == plan.expert_slots[0] * plan.expert_slot_bytes
    assert (plan.host_experts[0] > 0) == (tier == "host")
    used = sum(stage.experts_used for stage in result.stages)
    loaded = sum(stage.experts_loaded for stage in result.stages)
    layers = 4 if shape == "deepseek-v3" else 5
    assert layers * 2 <= used <= layers * 4 * plan.micro_batches and loaded <= used
    dense = sum(plan.nvme_bytes_a_pass) + sum(plan.host_bytes_a_pass)
    assert dense <= decode.needed_bytes <= decode.moved_bytes
    assert decode.needed_bytes <= dense + loaded * plan.expert_slot_bytes
    text = " ".join(printed(bench_tables.run_view("a title", work, result)).split())
    assert f"experts {used:,} reached by a decode pass's tokens" in text
    assert "needed with them" in text and "\u2026" not in text


def test_experts_of_resident_layers_are_apart_too(tmp_path: Path) -> None:
    work = Work(batch=2, prompt=8, new=8, tier="nvme", local=True)
    config = small_config("qwen3-235b") | {"num_hidden_layers": 5}
    given = replace(CPU, resident_layers=3, micro_batches=1)
    with random_store(tmp_path, config, "nf4", in_memory=False, keep=False) as store:
        result = run_work(given, work, store)
    assert result.plan.placement.tiers.count(Tier.DEVICE) == 3
    assert result.plan.memory[0].resident < store.layers[0].nbytes
    assert sum(stage.experts_used for stage in result.stages) >= 5 * 2


def test_a_mixture_that_does_not_stay_whole_is_no_tier_device(tmp_path: Path) -> None:
    work = Work(batch=2, prompt=8, new=6, tier="device", local=True)
    config = small_config("qwen3-235b") | {"num_hidden_layers": 20}
    given = replace(CPU, device_memory=1_900_000)
    with (
        random_store(tmp_path, config, "nf4", in_memory=False, keep=False) as store,
        pytest.raises(HeadraceError, match="--tier device keeps every layer with its experts"),
    ):
        run_work(given, work, store)


@pytest.mark.slow
def test_the_batch_is_what_the_plan_has_room_for(tmp_path: Path) -> None:
    small = replace(CPU, max_sequences=6)
    result = measured(tmp_path, "8b", Work(prompt=8, new=6, tier="nvme", local=True), small)
    assert 1 <= result.batch <= 6
    work = Work(batch=7, prompt=8, new=6, tier="nvme", local=True)
    with pytest.raises(
        HeadraceError, match=r"KV for \d+ sequences of 8 \+ 6 .* use --batch [1-6] "
    ):
        measured(tmp_path, "8b", work, small)
    tiny = replace(CPU, device_memory=100_000)
    with pytest.raises(DoesNotFitError):
        measured(tmp_path, "8b", work, tiny)


@pytest.mark.slow
def test_pages_have_room_in_host_memory_whatever_the_tier(tmp_path: Path) -> None:
    given = replace(CPU, kv_host_memory=1 << 20)
    for tier in ("nvme", "device", "host"):
        work = Work(batch=2, prompt=8, new=6, tier=tier, local=True)
        plan = measured(tmp_path, "8b", work, given).plan
        assert plan.host_pages > 0
        streamed = [sum(plan.nvme_bytes_a_pass), sum(plan.host_bytes_a_pass)]
        assert [count > 0 for count in streamed] == [tier == "nvme", tier == "host"]


def test_a_kept_store_is_used_again(tmp_path: Path) -> None:
    config = small_config("8b")
    with random_store(tmp_path, config, "int8", in_memory=True, keep=True) as store:
        first = store.path, store.digest
    with random_store(tmp_path, config, "int8", in_memory=True, keep=True) as store:
        assert (store.path, store.digest) == first
    assert re.fullmatch(r"headrace-llama-2-int8-[0-9a-f]{8}", store.path.name)


@pytest.mark.parametrize(
    ("given", "work", "said"),
    [
        ({"device": "cuda"}, Work(), "PyTorch sees no CUDA device"),
        ({"stages": 2}, Work(local=True), "--local runs one stage"),
        (
            {"host_memory": 5},
            Work(tier="nvme"),
            "has no weights in host memory: leave --host-memory out",
        ),
        ({"resident_layers": 5}, Work(tier="device"), "leave --resident-layers out"),
    ],
)
def test_contradictions_are_named(
    tmp_path: Path, given: dict[str, Any], work: Work, said: str
) -> None:
    if "device" in given and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    options = replace(CPU, **given)
    with pytest.raises(HeadraceError, match=said):
        check_request(options, work, tmp_path)


def test_a_drive_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match="is not a directory: make it first"):
        check_request(CPU, Work(), tmp_path / "absent")
    if Path("/dev/shm").is_dir():
        with pytest.raises(HeadraceError, match=r"is in memory \(tmpfs\) and not on a drive"):
            check_request(CPU, Work(tier="nvme"), Path("/dev/shm"))


def test_a_profile(tmp_path: Path) -> None:
    work = Work(batch=4, prompt=8, new=8, tier="host", local=True)
    with random_store(tmp_path, small_config("8b"), "nf4", in_memory=False, keep=False) as store:
        found = run_profile(CPU, work, store, tmp_path / "trace.json")
    assert found.passes == 2
    assert found.wall >= found.kernels_busy > 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "calls a pass" in printed(bench_tables.profile_table("8b", found))


@pytest.mark.slow
def test_the_drive_and_the_device(tmp_path: Path) -> None:
    readings = [*measure_drive(tmp_path, "cpu", 8 << 20), *measure_devices("cpu")]
    assert not list(tmp_path.iterdir())
    by_place = {(reading.what, reading.where): reading for reading in readings}
    assert (by_place["drive", "buffered to host"].value or 0) > 0
    assert by_place["drive", "kvikio to host"].value is None
    assert (by_place["matmul bfloat16", "CPU"].value or 0) > 0
    failed = Reading("drive", "direct to host", None, "GB/s", "refused [here]")
    assert "refused [here]" in printed(bench_tables.machine_table(tmp_path, "cpu", [failed]))
    with pytest.raises(HeadraceError, match="smaller --size"):
        next(measure_drive(tmp_path, "cpu", 1 << 60))


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["run", "9b"], "no shape is called '9b'"),
        (["run", "8b", "--layers", "99"], "8b has 32 layers"),
        (["io", "--json", str(tmp_path / "absent" / "io.json")], "not a directory to write to"),
        (["io", "--size", "big"], "is not a size"),
        (["io", "--directory", str(tmp_path / "absent")], "make it first"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["bench", *arguments])
        assert ended.value.code == 1
        error = capsys.readouterr().err.strip()
        assert said in error
        assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_two_stages_on_ray(tmp_path: Path) -> None:
    settings = [
        word
        for key, value in small_config("8b").items()
        if isinstance(value, int) and not isinstance(value, bool) and key != "num_hidden_layers"
        for word in ("--set", f"{key}={value}")
    ]
    file = tmp_path / "result.json"
    command = ["bench", "run", "8b", "--layers", "4", *settings, "--batch", "4", "--prompt", "8"]
    command += ["--new", "6", "--stages", "2", "--placement", "cyclic", "--tier", "nvme"]
    command += ["--device", "cpu", "--directory", tmp_path, "--json", file]
    with headrace(tmp_path, *command) as run:
        assert run.wait(170.0) == 0, run.stderr
        assert "share of the bound" in run.stdout
    found = json.loads(file.read_text())
    assert found["speeds"]["hop_seconds"] > 0
    assert found["decode"]["terms"]["hops"] > 0
    assert found["plan"]["passes_in_flight"] == 1
    assert [stage["nvme_bytes"] > 0 for stage in found["stages"]] == [True, True]
    assert sorted(tmp_path.glob("headrace-*")) == []
