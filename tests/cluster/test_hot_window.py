"""What --kv-hot-window makes of a plan, and runs of such plans, from the options that a user gives."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from headrace.cluster.bench.local import local_engine
from headrace.cluster.cli.kv_report import kv_table
from headrace.cluster.cli.plan import render_plan
from headrace.cluster.engine import Engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.kv_options import log_kv
from headrace.cluster.llm import LLM
from headrace.cluster.run_plan import local_plan
from headrace.runtime.store import Store
from headrace.scheduler.plan import MoveKind
from headrace.scheduler.request import SamplingParams

MIB = 1 << 20
HOT: dict[str, Any] = {
    "device_memory": 32 * MIB,
    "host_memory": 64 * MIB,
    "kv_host_memory": 20 * MIB,
    "kv_disk": 256 * MIB,
    "context": 448,
    "min_sequences": 10,
    "max_sequences": 10,
    "kv_hot_window": 64,
}
LONG = [[5 + (i * j) % 900 for j in range(1, 330 + 10 * i)] for i in range(1, 11)]


def served(engine: Engine) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    ids = [engine.add(tokens, params, seed=0) for tokens in LONG]
    done = {}
    while engine.has_work:
        done |= {completion.request_id: completion.token_ids for completion in engine.step()}
    return [done[i] for i in ids]


@pytest.mark.slow
def test_a_plan_says_what_is_decoded_over_on_nvme(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a run of it does it, in the half of --kv-disk that is for that."""
    options = EngineOptions(stories, device="cpu", **(HOT | {"kv_directory": tmp_path / "kv"}))
    with local_engine(options) as engine:
        plan = engine.plan
        assert plan.window_pages and plan.hot_window == 64
        Console(width=80).print(render_plan(plan))
        found = served(engine)
        kv, (times,) = engine.stats.kv, engine.stats.stages
        assert kv.moved[MoveKind.SINK] and times.kv_sunk_bytes and not kv.spoiled
        assert 0 < engine.stats.bound_seconds < engine.stats.busy_seconds
        table = kv_table(kv, engine.stats.stages)
        assert table is not None
        Console(width=80).print(table)
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{plan.window_pages} of their pages older than 64 tokens have room on NVMe" in said
    assert "KV pages on their way from NVMe" in said and "to NVMe to decode over" in said
    assert "read from NVMe, for each token again" in said
    assert not any((tmp_path / "kv").iterdir())
    whole = EngineOptions(stories, device="cpu", device_memory=100 * MIB, context=448)
    with local_engine(whole) as engine:
        assert served(engine) == found


def test_a_window_that_nobody_needs_is_warned_of(
    stories: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = HOT | {"kv_directory": Path("kv"), "min_sequences": 1, "max_sequences": 1}
    plan = local_plan(EngineOptions(stories, device="cpu", **few), Store.open(stories))
    assert not plan.window_pages
    log_kv(plan, 64)
    assert "--kv-hot-window is of no use here" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_stages_of_their_own_processes_decode_over_nvme(stories: Path, tmp_path: Path) -> None:
    room = HOT | {"device_memory": 24 * MIB, "min_sequences": 14, "max_sequences": 14}
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    found = []
    for more in (room | {"kv_directory": tmp_path / "kv"}, {"device_memory": "100MiB"}):
        with LLM(stories, device="cpu", stages=2, **({"context": 448} | more)) as llm:
            outputs = llm.generate(LONG + [tokens[5:] for tokens in LONG], params)
            found.append([output.outputs[0].token_ids for output in outputs])
            if "kv_directory" in more:
                assert llm.plan.window_pages and llm.stats.kv.moved[MoveKind.SINK]
                assert all(stage.kv_sunk_bytes for stage in llm.stats.stages)
    assert found[0] == found[1]
    assert not any((tmp_path / "kv").iterdir())
