"""What is told of an engine after another ring, planned anew, has taken the place of its first one."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rings import local_ring, manual_plan

from headrace.cluster.engine import Engine
from headrace.cluster.engine_stats import EngineStats
from headrace.cluster.job_files import JobFiles
from headrace.cluster.job_report import JobReport, Work
from headrace.cluster.jobs import Job
from headrace.cluster.recovery import StageState
from headrace.cluster.ring import Ring
from headrace.cluster.serving.recent_work import RecentWork
from headrace.cluster.tokenizer import load_tokenizer, stop_ids
from headrace.runtime.store import Store
from headrace.scheduler.errors import NoPlaceError, StageLostError
from headrace.scheduler.placement import Tier
from headrace.scheduler.plan import Pass, PassResult, StageTimes
from headrace.scheduler.request import SamplingParams


def a_pass(stats: EngineStats, seconds: float) -> None:
    """All stages were at work for half of it, and brought 10 bytes."""
    stats.add(
        Pass(stats.passes, ()),
        [
            PassResult(0, (), StageTimes(stage, seconds / 2, 0.0, 0.0, 10, 0))
            for stage in range(stats.num_stages)
        ],
    )
    stats.passes += 1
    stats.busy_seconds += seconds


@pytest.mark.parametrize("stages", [2, 1, 3])
def test_work_goes_on_with_the_stages_of_another_ring(stages: int) -> None:
    stats = EngineStats(2)
    a_pass(stats, 1.0)
    before = Work.of(stats)
    a_pass(stats, 1.0)
    assert [times.total for times in Work.of(stats).since(before).stages] == [0.5, 0.5]
    stats.moved(stages)
    a_pass(stats, 4.0)
    work = Work.of(stats).since(before)
    assert (work.passes, work.busy_seconds, work.moves) == (2, 5.0, 1)
    assert [times.total for times in work.stages] == [2.0] * stages
    again = Work.of(stats)
    a_pass(stats, 2.0)
    work = Work.of(stats).since(again)
    assert [times.total for times in work.stages] == [1.0] * stages and not work.moves


def test_recent_work_is_of_one_ring() -> None:
    stats = EngineStats(2)
    recent = RecentWork(Work.of(stats))
    for now in range(4):
        a_pass(stats, 1.0)
        recent.note(float(now), Work.of(stats))
    stats.moved(2)
    for now in range(4, 7):
        a_pass(stats, 2.0)
        recent.note(float(now), Work.of(stats))
    assert recent.span is not None
    work = recent.span.work
    assert (work.passes, work.busy_seconds, work.moves) == (2, 4.0, 0)
    assert [times.total for times in work.stages] == [2.0, 2.0]


def test_no_stage_was_idle_before_it_was_there() -> None:
    stats = EngineStats(3)
    a_pass(stats, 8.0)
    assert stats.idle_seconds() == [4.0, 4.0, 4.0]
    stats.moved(2)
    assert stats.idle_seconds() == [4.0, 4.0]
    a_pass(stats, 2.0)
    assert stats.idle_seconds() == [5.0, 5.0]
    stats.moved(3)
    a_pass(stats, 2.0)
    assert stats.idle_seconds() == [6.0, 6.0, 5.0]


class NoPlace:
    """Finds a stage dead as soon as the engine looks, and no place for another one."""

    states: ClassVar[list[StageState]] = []

    def check(self) -> None:
        raise StageLostError("stage 1 died.", (1,))

    def recover(self, error: StageLostError, *_: object) -> None:
        raise NoPlaceError(str(error))


@pytest.fixture
def moving(stories: Path) -> Iterator[Engine]:
    """Two stages in this process until it is tended, then one."""
    room: Any = {"num_pages": 24, "max_sequences": 6, "token_budget": 100}
    store, tokenizer = Store.open(stories), load_tokenizer(stories)
    with ExitStack() as opened:

        def ring(stages: int, recovery: Any) -> Ring:
            plan = manual_plan(store, stages=stages, tier=Tier.DEVICE, **room)
            pipeline = opened.enter_context(local_ring(stories, plan))
            return Ring(plan, pipeline, recovery=recovery, traces=pipeline)

        yield opened.enter_context(
            Engine(
                ring(2, NoPlace()),
                tokenizer,
                stop_ids=stop_ids(store, tokenizer),
                digest="",
                dtype="float32",
                rebuild=lambda: ring(1, None),
            )
        )


def test_planning_anew_counts_as_one_recovery(moving: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    moving.add([1, 2, 3], params, seed=0)
    while moving.stats.output_tokens < 4:
        moving.step()
    moving._come_to_rest()
    moving.tend()
    [done] = moving.stats.recoveries
    assert (done.replanned, done.stages, done.requests) == (1, (), 1)
    assert {*done.phases} == {"waiting for a place", "planning anew"}
    assert moving.events.recoveries == {"replanned": 1} and not moving.events.replaced_stages
    assert sum(moving.events.recovery_seconds.values()) == pytest.approx(done.seconds)
    assert moving.stats.moves == 1 and len(moving.stats.stages) == 1
    completions = []
    while moving.has_work:
        completions += moving.step()
    assert [len(completion.token_ids) for completion in completions] == [8]


def test_a_job_goes_on_over_another_ring(moving: Engine, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Once", "max_tokens": 12}\n' * 3)
    reports: list[JobReport] = []

    def note(report: JobReport) -> None:
        reports.append(report)
        if report.work.passes == 4 and not moving.stats.moves:
            moving._come_to_rest()
            moving.tend()

    with JobFiles(source, output, "", SamplingParams(temperature=0.0)) as files:
        done = Job(moving, moving.tokenizer, files, model_name="m").run(note)
    assert done.answered == 3 and done.work.moves == 1
    assert done.last_ring is not None and reports[0].last_ring is None
    last = done.last_ring.work
    assert 0 < last.passes < done.work.passes and 0 < done.last_ring.seconds < done.seconds
    assert last.stages == done.work.stages == tuple(moving.stats.stages)
