"""What is told of an engine after another ring, planned anew, has taken the place of its first one."""

import pytest

from headrace.cluster.engine_stats import EngineStats
from headrace.cluster.job_report import Work
from headrace.cluster.serving.recent_work import RecentWork
from headrace.scheduler.plan import Pass, PassResult, StageTimes


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
