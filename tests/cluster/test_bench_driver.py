"""Which passes of a run count as steady decodes, and the cap on host memory."""

import os
from pathlib import Path

import pytest

from headrace.cluster.bench.driver import Step, steady
from headrace.cluster.bench.memory_cap import host_memory_cap
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.plan import StageTimes


def steps(*rows: tuple[float, int, int]) -> list[Step]:
    """(seconds, committed tokens, ended requests) of each pass; one stage that streams 10 bytes."""
    return [
        Step(seconds, committed, ended, (StageTimes(0, seconds, 0.5, 0.0, 10, 0),))
        for seconds, committed, ended in rows
    ]


def test_steady_passes_come_after_all_prompts_and_before_the_first_end() -> None:
    run = steps((9, 2, 0), (8, 4, 0), (1, 4, 0), (3, 4, 0), (2, 4, 0), (7, 4, 2), (6, 2, 2))
    found = steady(run, 4, 1)
    assert found.prefill_seconds == 17
    assert found.rounds == (1, 3, 2)
    assert found.seconds == 2
    assert found.stages == (StageTimes(0, 2, 0.5, 0.0, 10, 0),)
    assert found.prefill_stages == (StageTimes(0, 17, 1.0, 0.0, 20, 0),)
    assert found.prefill_passes == 2


def test_a_round_is_as_many_passes_as_are_in_flight() -> None:
    run = steps((9, 2, 0), (9, 2, 0), (1, 2, 0), (2, 2, 0), (3, 2, 0), (4, 2, 0), (1, 2, 2))
    found = steady(run, 4, 2)
    assert found.rounds == (3, 7)
    assert found.stages[0].nvme_bytes == 20


def test_a_run_without_steady_passes_says_so() -> None:
    with pytest.raises(HeadraceError, match="decoded all 4 sequences"):
        steady(steps((1, 2, 0), (1, 2, 2), (1, 2, 2)), 4, 1)


@pytest.mark.parametrize(
    ("own", "home", "above", "limit"),
    [
        ("4:cpu:/\n3:memory:/a/b\n0::/\n", "memory/a/b", "memory/a/b", "memory.limit_in_bytes"),
        ("0::/user.slice/a.scope\n", "user.slice/a.scope", "user.slice", "memory.max"),
        ("0::/\n", "", "", "memory.max"),
    ],
)
def test_host_memory_is_capped_by_a_cgroup_that_may(
    tmp_path: Path, own: str, home: str, above: str, limit: str
) -> None:
    described, root = tmp_path / "own", tmp_path / "root"
    described.write_text(own)
    (root / home).mkdir(parents=True)
    (root / above / "cgroup.subtree_control").write_text("cpu memory\n")
    with host_memory_cap(5 << 30, root, described):
        (made,) = (root / above).glob("headrace-bench-*")
        assert (made / limit).read_text() == str(5 << 30)
        assert (made / "cgroup.procs").read_text() == str(os.getpid())
        for file in made.iterdir():  # the kernel's files go with their directory
            file.unlink()
    assert (root / home / "cgroup.procs").read_text() == str(os.getpid())
    assert not made.exists()


def test_a_cap_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    described = tmp_path / "own"
    described.write_text("0::/absent")
    with (
        pytest.raises(HeadraceError, match="cannot cap host memory"),
        host_memory_cap(1 << 30, tmp_path, described),
    ):
        pytest.fail("ran without a cap")
