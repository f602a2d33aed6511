"""Stages that die or hang while requests are under way: others take their place, and no token changes."""

import os
import random
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from commands import wait_for
from disturbed import answers
from kv_runs import CAP, wide_llama
from ray_engines import ray_engine
from rings import manual_plan

from headrace.cluster import replacement
from headrace.cluster.engine import Engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.launch import running_engine
from headrace.cluster.processes import find_node
from headrace.runtime.stage_config import LogConfig
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError, StageError, StageLostError
from headrace.scheduler.placement import Plan, Tier

pytestmark = pytest.mark.usefixtures("ray_here")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_llama(tmp_path_factory.mktemp("llama"))


def plan_of(store: Path, **room: Any) -> Plan:
    given: dict[str, Any] = {
        "stages": 3,
        "tier": Tier.DEVICE,
        "num_pages": 24,
        "max_sequences": 6,
        "token_budget": 100,
        "ahead": 1,
    }
    return manual_plan(Store.open(store), **(given | room))


class Blow:
    """Sends a signal to some stages when so many passes have returned, once."""

    def __init__(
        self, engine: Engine, stages: list[int], passes: int, number: int = signal.SIGKILL
    ) -> None:
        self._engine, self._stages, self._passes, self._number = engine, stages, passes, number
        self.pids = engine.stage_pids()

    def __call__(self, passes: int) -> None:
        if passes >= self._passes:
            for stage in self._stages:
                os.kill(self.pids[stage], self._number)
            self._stages = []


def changed(engine: Engine, blow: Blow) -> list[int]:
    """Stages that have other processes now."""
    pids = zip(blow.pids, engine.stage_pids(), strict=True)
    return [stage for stage, (before, now) in enumerate(pids) if before != now]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stages", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_stage_that_is_killed_is_replaced_and_no_other_is(llama: Path, stages: int) -> None:
    with ray_engine(llama, plan_of(llama, stages=stages), patience=5.0) as engine:
        want = answers(engine, "a")
        blow = Blow(engine, [1], 10)
        assert answers(engine, "b", blow) == want
        assert changed(engine, blow) == [1]
        [recovery] = engine.stats.recoveries
        assert recovery.stages == (1,) and recovery.requests > 0
        assert answers(engine, "b") == want


RINGS: list[dict[str, Any]] = [
    {"ahead": 0, "passes_in_flight": 3},
    {"cyclic": True, "tier": Tier.NVME, "passes_in_flight": 2},
    {"stages": 1, "tier": Tier.HOST},
    {"kv_format": "int8", "num_tails": 8, "num_pages": 9, "host_pages": 20, "nvme_pages": 200},
    {"num_pages": 9, "host_pages": 20, "kv_ring_pages": 12, "cold_micro_batches": 1},
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ring", RINGS, ids=str)
def test_whatever_dies_or_hangs_whenever(llama: Path, tmp_path: Path, ring: dict[str, Any]) -> None:
    plan, rng = plan_of(llama, **ring), random.Random(0)
    log = LogConfig(str(tmp_path / "kv"), CAP) if plan.nvme_pages else None
    stages = range(plan.placement.num_stages)
    with ray_engine(llama, plan, log, patience=5.0) as engine:
        want = answers(engine, "a")
        for number, count in [(signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGKILL, 2)]:
            victims = rng.sample(stages, min(count, len(stages)))
            blow = Blow(engine, victims, rng.randint(1, 40), number)
            assert answers(engine, f"{number}", blow) == want
            assert changed(engine, blow) == sorted(victims)
        engine._scheduler.holdings.check_integrity()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("doing", ["open", "load"])
def test_a_new_process_that_is_stopped_is_replaced_itself(
    llama: Path, doing: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While it starts, and while it loads: long before the time is up that either may take."""
    with ray_engine(llama, plan_of(llama), patience=3.0) as engine:
        want = answers(engine, "a")
        blow = Blow(engine, [1], 10)
        stopped: list[int] = []

        def stop() -> None:
            def found() -> bool:
                stopped.extend(processes_doing(doing) - {*blow.pids})
                return bool(stopped)

            wait_for(found, 60.0, lambda: f"no new process does {doing}")
            os.kill(stopped[0], signal.SIGSTOP)

        with ThreadPoolExecutor(1) as thread:
            stopping = thread.submit(stop)
            assert answers(engine, "b", blow) == want
            stopping.result()
        [recovery] = engine.stats.recoveries
        assert recovery.stages == (1,) and recovery.rounds == 2
        assert engine.stage_pids()[1] not in (0, blow.pids[1], stopped[0])
        assert changed(engine, blow) == [1]
        assert (
            f"stage 1 has been stopped by SIGSTOP for 3 s (process {stopped[0]} on" in caplog.text
        )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stage_that_is_stopped_before_it_has_loaded_is_named(stories: Path) -> None:
    options = EngineOptions(
        stories, stages=2, device="cpu", device_memory=64 << 20, context=512, heartbeat_timeout=3.0
    )
    pids: list[int] = []

    def stop(actors: Sequence[Any]) -> None:
        pids.extend(ray.get([each.__ray_call__.remote(lambda _: os.getpid()) for each in actors]))
        os.kill(pids[1], signal.SIGSTOP)

    said = "loading weights: stage 1 has been stopped by SIGSTOP for 3 s"
    with pytest.raises(StageLostError, match=said) as found, running_engine(options, watch=stop):
        pass
    assert f"(process {pids[1]} on " in str(found.value) and found.value.silent == (1,)


def processes_doing(what: str) -> set[int]:
    """Of the actors of this test: Ray titles processes with the call that they are in."""
    found = set()
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if f"StageActor.{what}" in " ".join(each.cmdline()):
                found.add(each.pid)
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stage_that_dies_with_nothing_to_do_is_replaced(llama: Path) -> None:
    with ray_engine(llama, plan_of(llama), patience=3.0) as engine:
        want = answers(engine, "a")
        blow = Blow(engine, [2], 0)
        blow(0)

        def tended() -> bool:
            engine.tend()
            return engine.stats.num_recoveries == 1

        wait_for(tended, 60.0, lambda: "it was not noticed")
        assert changed(engine, blow) == [2]
        assert answers(engine, "b") == want


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pages_on_nvme_outlive_the_process_that_wrote_them(llama: Path, tmp_path: Path) -> None:
    """Their keys are in the driver's memory, too, and in no file."""
    plan = plan_of(llama, host_pages=8, nvme_pages=500)
    log = LogConfig(str(tmp_path / "kv"), CAP)
    with ray_engine(llama, plan, log, write_through=True) as engine:
        want = answers(engine, "a")
        before, found = engine.stats.kv.nvme, engine.stats.kv.hits.nvme
        assert before
        blow = Blow(engine, [1], 0)
        assert answers(engine, "b", blow) == want
        assert answers(engine, "a") == want
        assert engine.stats.kv.hits.nvme > found
    assert not any((tmp_path / "kv").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pages_that_were_written_through_are_not_computed_again(
    llama: Path, tmp_path: Path
) -> None:
    plan = plan_of(llama, num_pages=48, max_sequences=8, host_pages=16, nvme_pages=500)
    computed: dict[bool, int] = {}
    for through in (False, True):
        log = LogConfig(str(tmp_path / "kv"), CAP)
        with ray_engine(llama, plan, log, write_through=through) as engine:
            ring: Any = engine._pipeline._pipeline  # type: ignore[attr-defined]
            want = answers(engine, "a")
            before = ring.computed
            assert answers(engine, "b", Blow(engine, [1], 45)) == want
            computed[through] = ring.computed - before
    assert computed[True] < 0.8 * computed[False]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_ends_stages_again_and_again_is_given_up(llama: Path) -> None:
    with ray_engine(llama, plan_of(llama), patience=3.0) as engine:

        def disturb(passes: int) -> None:
            os.kill(engine.stage_pids()[0], signal.SIGKILL)

        with pytest.raises(StageError, match="No pass has returned since 5 recoveries"):
            answers(engine, "a", disturb)


@pytest.mark.slow
def test_without_recovery_a_death_is_an_error(llama: Path) -> None:
    with ray_engine(llama, plan_of(llama), recovers=False) as engine:
        blow = Blow(engine, [], 0)
        assert blow.pids == []
        ring: Any = engine._pipeline._pipeline  # type: ignore[attr-defined]
        ray.kill(ring._actors[1])
        with pytest.raises(StageError, match="stage 1 died"):
            answers(engine, "a")


def test_a_node_is_named_so_that_there_is_one() -> None:
    (node,) = ray.nodes()
    for name in ("NodeID", "NodeManagerHostname", "NodeManagerAddress"):
        assert find_node(node[name]) == node["NodeID"]
    with pytest.raises(HeadraceError, match="0 nodes of the Ray cluster are elsewhere"):
        find_node("elsewhere")


def test_a_cluster_with_nothing_to_spare_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacement, "SPARE_SECONDS", 0.2)
    replacement._check_spare("cpu")
    with pytest.raises(HeadraceError, match="the Ray cluster has no GPU to spare"):
        replacement._check_spare("cuda:0")
