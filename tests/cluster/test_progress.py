"""What rows had said when a job was killed: they go on from there."""

from collections.abc import Callable
from pathlib import Path

from headrace.cluster.progress import FLUSH_SECONDS, GARBAGE, LEAST_BYTES, Progress
from headrace.scheduler.plan import Sample

JOB = {"created": 1, "model": "m"}


def samples(*tokens: int) -> list[Sample]:
    return [Sample(-1, token, -0.5, ((token, -0.5), (7, -2.0))) for token in tokens]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += FLUSH_SECONDS
        return self.now


def opened(path: Path, is_finished: Callable[[int], bool] = lambda number: False) -> Progress:
    return Progress(path, JOB, is_finished, Clock())


def note(progress: Progress, part: tuple[int, int, int], *tokens: int) -> None:
    for sample in samples(*tokens):
        progress.note(part, sample)
    progress.flush()


def test_rows_go_on_from_all_but_their_last_token(tmp_path: Path) -> None:
    path, part = tmp_path / "out.progress", (4, 99, 0)
    with opened(path) as progress:
        note(progress, part, 1, 2)
        note(progress, part, 3, 4)
        note(progress, (5, 98, 1), 8)
    with opened(path) as progress:
        assert progress.resumed(part) == samples(1, 2, 3)
        assert progress.resumed((5, 98, 1)) == []
        assert progress.resumed((6, 1, 0)) == []
        note(progress, part, 4, 5, 6)
    with opened(path) as progress:
        assert progress.resumed(part) == samples(1, 2, 3, 4, 5)


def test_another_key_is_another_row(tmp_path: Path) -> None:
    with opened(tmp_path / "p") as progress:
        note(progress, (4, 99, 0), 1, 2)
    with opened(tmp_path / "p") as progress:
        assert progress.resumed((4, 98, 0)) == []


def test_another_jobs_file_is_ignored(tmp_path: Path) -> None:
    with opened(tmp_path / "p") as progress:
        note(progress, (4, 99, 0), 1, 2)
    with Progress(tmp_path / "p", {"created": 2, "model": "m"}) as progress:
        assert progress.resumed((4, 99, 0)) == []
    with opened(tmp_path / "p") as progress:
        assert progress.resumed((4, 99, 0)) == []


def test_nothing_is_kept_of_rows_that_have_finished(tmp_path: Path) -> None:
    with opened(tmp_path / "p") as progress:
        note(progress, (4, 99, 0), 1, 2)
        note(progress, (5, 99, 0), 1, 2)
        progress.forget(5)
    size = (tmp_path / "p").stat().st_size
    with opened(tmp_path / "p", lambda number: number == 4) as progress:
        assert progress.resumed((4, 99, 0)) == []
        assert progress.resumed((5, 99, 0)) == samples(1)
        assert (tmp_path / "p").stat().st_size < size


def test_a_torn_end_costs_its_tokens(tmp_path: Path) -> None:
    part = (4, 99, 0)
    with opened(tmp_path / "p") as progress:
        note(progress, part, 1, 2, 3)
        size = (tmp_path / "p").stat().st_size
        note(progress, part, 4, 5)
    whole = (tmp_path / "p").read_bytes()
    for cut in range(size, len(whole)):
        (tmp_path / "p").write_bytes(whole[:cut])
        with opened(tmp_path / "p") as progress:
            assert progress.resumed(part) == samples(1, 2)
    (tmp_path / "p").write_bytes(b"\xff" * 100)
    with opened(tmp_path / "p") as progress:
        assert progress.resumed(part) == []


def test_the_file_is_bounded_by_what_is_under_way(tmp_path: Path) -> None:
    with opened(tmp_path / "p") as progress:
        for row in range(400):
            note(progress, (row, 99, 0), *range(2000))
            progress.forget(row)
            assert (tmp_path / "p").stat().st_size < LEAST_BYTES + GARBAGE * 100_000
        note(progress, (1000, 99, 0), 1, 2, 3)
    with opened(tmp_path / "p") as progress:
        assert progress.resumed((1000, 99, 0)) == samples(1, 2)


def test_it_goes_with_the_job(tmp_path: Path) -> None:
    progress = opened(tmp_path / "p")
    note(progress, (4, 99, 0), 1)
    progress.close(complete=True)
    assert not any(tmp_path.iterdir())
