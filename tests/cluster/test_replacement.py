"""Stages change processes while requests are under way: the same tokens, and nothing computed again."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from commands import wait_for
from kv_runs import CAP, assert_moved, prompt, wide_llama
from ray_engines import ray_engine
from rings import manual_plan

from headrace.cluster.completion import Completion
from headrace.cluster.engine import Engine
from headrace.runtime.stage_config import LogConfig
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.placement import Plan, Tier
from headrace.scheduler.plan import MoveKind
from headrace.scheduler.request import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_here")]

PROMPTS = [prompt(i, 60 + 25 * i) for i in range(8)]
NEW = 40
PARAMS = [SamplingParams(temperature=t, max_tokens=NEW, ignore_eos=True) for t in (0.0, 0.9)]
COMPUTED = sum(len(tokens) + NEW - 1 for tokens in PROMPTS)
"""Tokens, each once; the last one of each request is not."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_llama(tmp_path_factory.mktemp("llama"))


class Change:
    """Replaces a stage as soon as enough was computed and, if that is asked for, some pages are cold."""

    def __init__(
        self, stage: int, after: int, node: str | None = None, *, cold: bool = False
    ) -> None:
        self._stage, self._after, self._node, self._cold = stage, after, node, cold

    def is_due(self, engine: Engine, computed: int) -> bool:
        return computed >= self._after and (engine.stats.kv.cold > 0 or not self._cold)

    def make(self, engine: Engine) -> None:
        done = engine.replace_stage(self._stage, self._node)
        assert (done.stage, done.lost, done.requests) == (self._stage, 0, 0)
        assert done.pages and done.nbytes


def answers(
    engine: Engine, tenant: str, *changes: Change, keep: bool = True
) -> tuple[list[Any], int]:
    """Of all prompts at once, and how many tokens were computed; one change after the other is made."""
    ring: Any = engine._pipeline._pipeline  # type: ignore[attr-defined]
    before, done, left = ring.computed, {}, list(changes)
    ids = [
        engine.add(tokens, PARAMS[i % 2], seed=i, tenant=tenant, keep=keep)
        for i, tokens in enumerate(PROMPTS)
    ]
    while engine.has_work:
        if left and left[0].is_due(engine, ring.computed - before):
            left.pop(0).make(engine)
        done |= {completion.request_id: completion.token_ids for completion in engine.step()}
    assert not left
    return [done[request_id] for request_id in ids], ring.computed - before


def here() -> str:
    return str(ray.nodes()[0]["NodeID"])


def processes_of(name: str) -> list[psutil.Process]:
    def title(process: psutil.Process) -> str:
        try:
            return " ".join(process.cmdline())
        except psutil.Error:
            return ""

    # Not all of the machine: somebody else's stages start there, too.
    here = psutil.Process().children(recursive=True)
    return [each for each in here if f"ray::{name}" in title(each)]


def plan_of(store: Path, **room: Any) -> Plan:
    """Device pages for few of the requests; others have theirs in host RAM or wait."""
    given: dict[str, Any] = {
        "stages": 2,
        "tier": Tier.DEVICE,
        "num_pages": 9,
        "max_sequences": 6,
        "token_budget": 100,
        "ahead": 1,
        "host_pages": 20,
        "kv_ring_pages": 12,
        "cold_micro_batches": 1,
    }
    return manual_plan(Store.open(store), **(given | room))


@pytest.mark.timeout(600)
def test_requests_go_on_with_all_their_pages(llama: Path, tmp_path: Path) -> None:
    """Pages on the device, in host RAM, held there by guests, and on NVMe under keys in no file; once
    through memory of the machine and once through the object store."""
    log = LogConfig(str(tmp_path / "kv"), CAP)
    before = set(os.listdir("/dev/shm"))
    with ray_engine(llama, plan_of(llama, nvme_pages=500), log) as engine:
        want, computed = answers(engine, "a")
        assert computed == COMPUTED
        written = [report.stats for report in engine.log_reports() if report]
        changes = Change(0, 300, cold=True), Change(1, 700, here(), cold=True)
        assert answers(engine, "b", *changes) == (want, COMPUTED)
        assert_moved(engine.stats.kv, MoveKind.OUT, MoveKind.SPILL)
        engine.add(PROMPTS[4], PARAMS[0], seed=4, tenant="a")
        assert [completion.token_ids for completion in ended(engine)] == [want[4]]
        assert engine.stats.kv.hits.nvme, "pages were found in the logs"
        for was, report in zip(written, engine.log_reports(), strict=True):
            assert report is not None and report.stats.payload_written > was.payload_written
        assert not any(engine.stats.kv.lost.values())
    assert not any((tmp_path / "kv").iterdir())
    assert not processes_of("PayloadKeeper")
    assert {name for name in os.listdir("/dev/shm") if "headrace" in name} <= before


def ended(engine: Engine) -> list[Completion]:
    found = []
    while engine.has_work:
        found += engine.step()
    return found


RINGS: list[dict[str, Any]] = [
    {"kv_format": "int8", "num_tails": 8},
    {"stages": 3, "cyclic": True, "passes_in_flight": 2},
    {"stages": 1, "nvme_pages": 500},
]


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("through", ["memory", "object store"])
def test_every_stage_of_every_ring(
    llama: Path, tmp_path: Path, ring: dict[str, Any], through: str
) -> None:
    node = None if through == "memory" else here()
    plan = plan_of(llama, **ring)
    log = LogConfig(str(tmp_path / "kv"), CAP) if plan.nvme_pages else None
    with ray_engine(llama, plan, log) as engine:
        want, computed = answers(engine, "a")
        stages = range(plan.placement.num_stages)
        changes = [Change(stage, 100 + 250 * stage, node) for stage in stages]
        if node:  # and back to where it was, or Ray has nothing to spare for the next one
            changes = [
                change
                for stage in {0, plan.placement.num_stages - 1}
                for change in (Change(stage, 100 + 400 * (stage > 0), node), Change(stage, 300))
            ]
        assert answers(engine, "b", *changes) == (want, computed)


class SunkChange(Change):
    """Replaces a stage while pages are decoded over on NVMe."""

    def is_due(self, engine: Engine, computed: int) -> bool:
        return super().is_due(engine, computed) and engine.stats.kv.sunk > 0

    def make(self, engine: Engine) -> None:
        done = engine.replace_stage(self._stage, self._node)
        assert done.pages and done.lost and done.requests


def test_what_goes_with_a_process_is_computed_again(llama: Path, tmp_path: Path) -> None:
    """Slots on NVMe that are decoded over are memory of one process."""
    sinking = {"host_pages": 4, "cold_micro_batches": 2, "window_pages": 30, "hot_window": 64}
    plan = plan_of(llama, nvme_pages=200, **sinking)
    with ray_engine(llama, plan, LogConfig(str(tmp_path / "kv"), 2 * CAP)) as engine:
        want, _ = answers(engine, "a")
        changes = SunkChange(0, 0), SunkChange(1, 0, here())
        found, computed = answers(engine, "b", *changes, keep=False)  # what is kept never sinks
        assert found == want and computed > COMPUTED
        assert_moved(engine.stats.kv, MoveKind.SINK)
        assert not engine.stats.kv.spoiled


def test_a_log_that_is_kept_outlives_every_process(llama: Path, tmp_path: Path) -> None:
    plan = plan_of(llama, host_pages=8, nvme_pages=500)
    log = LogConfig(str(tmp_path / "kv"), CAP, keep=True, key_file=str(tmp_path / "keys"))
    with ray_engine(llama, plan, log) as engine:
        want, _ = answers(engine, "", Change(0, 300), Change(1, 600, here()))
        engine.save()
    with ray_engine(llama, plan, log) as engine:
        found, computed = answers(engine, "")
        assert found == want and computed < COMPUTED and engine.stats.kv.hits.nvme


def test_a_process_that_cannot_be_had_costs_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another node the old one is there until the new one has taken over."""
    store = tmp_path / "store"
    shutil.copytree(llama, store)
    with ray_engine(store, plan_of(store)) as engine:
        want, computed = answers(engine, "a")

        class Fails(Change):
            def make(self, engine: Engine) -> None:
                store.rename(tmp_path / "away")
                try:
                    with pytest.raises(HeadraceError, match="store"):
                        engine.replace_stage(0, here())
                finally:
                    (tmp_path / "away").rename(store)

        assert answers(engine, "b", Fails(0, 300), Change(0, 400, here())) == (want, computed)
        for stage, node, said in (
            (2, None, "there is no stage 2 to replace: they are 0 to 1"),
            (0, "nowhere", "0 nodes of the Ray cluster are nowhere: name one by its id"),
        ):
            with pytest.raises(HeadraceError, match=said):
                engine.replace_stage(stage, node)
        assert answers(engine, "c") == (want, computed)


def test_a_new_process_that_dies_is_replaced_itself(llama: Path) -> None:
    with ray_engine(llama, plan_of(llama)) as engine:
        want, _ = answers(engine, "a")

        def kill() -> None:
            wait_for(lambda: bool(processes_of("PayloadKeeper")), 60.0, lambda: "no hand-over")
            old = {each.pid for each in processes_of("StageActor")}
            wait_for(lambda: bool({*_pids()} - old), 60.0, lambda: "no new process")
            for pid in {*_pids()} - old:
                psutil.Process(pid).kill()

        killer = threading.Thread(target=kill)
        killer.start()
        done = engine.replace_stage(0)
        killer.join()
        assert done.pages == 0 < done.lost and engine.stats.recoveries[-1].stages == (0,)
        assert answers(engine, "b")[0] == want
    wait_for(lambda: not processes_of("PayloadKeeper"), 10.0, lambda: "memory is kept")


def _pids() -> list[int]:
    return [each.pid for each in processes_of("StageActor")]
