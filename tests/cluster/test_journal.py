import fcntl
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headrace.cluster.append_file import AppendFile, frame
from headrace.cluster.journal import QUARANTINED, JobIdentity, Journal, journal_path
from headrace.scheduler.errors import JobError

IDENTITY = JobIdentity("model", "input", {"max_tokens": 16, "stop": ()})


def line(number: int) -> bytes:
    return b'{"id": %d, "text": "%s"}\n' % (number, b"x" * number)


def fill(journal: Journal, numbers: range) -> None:
    """Every third row is refused; finished rows are left alone."""
    for number in numbers:
        if journal.key_of(number) is None:
            if number % 3:
                journal.answer(number, number + 1000, line(number))
            else:
                journal.refuse(number, line(number))
        if number % 4 == 0:
            journal.sync()


def contents(output: Path) -> tuple[bytes, bytes]:
    with_errors = output.with_name("out.errors.jsonl")
    return output.read_bytes(), with_errors.read_bytes() if with_errors.exists() else b""


def test_finished_rows_are_remembered(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Journal(output, IDENTITY) as journal:
        fill(journal, range(1, 10))
        created = journal.created
    with Journal(output, IDENTITY) as journal:
        assert journal.key_of(1) == 1001
        assert journal.key_of(3) == QUARANTINED
        assert journal.key_of(10) is None
        assert journal.key_of(10**9) is None
        assert (journal.num_answered, journal.num_quarantined) == (6, 3)
        assert journal.created == created
    assert contents(output)[0] == b"".join(line(n) for n in range(1, 10) if n % 3)


def test_the_quarantine_is_made_when_a_row_needs_it(tmp_path: Path) -> None:
    with Journal(tmp_path / "out.jsonl", IDENTITY) as journal:
        journal.answer(1, 5, line(1))
        assert not journal.quarantine.exists()
        journal.refuse(2, line(2))
        assert journal.quarantine.read_bytes() == line(2)


def written_in_order(output: Path) -> list[tuple[Path, bytes]]:
    """Every append of a finished job, in the order in which it was made."""
    log = AppendFile(journal_path(output))
    log.open()
    frames, data = list(log.frames()), log.path.read_bytes()
    log.close()
    files = (output, output.with_name("out.errors.jsonl"))
    whole = [path.read_bytes() for path in files]
    appends, start = [], 0
    for payload, end in frames:
        if isinstance(payload, list) and payload:
            _, _, index, offset, length, _ = payload
            appends.append((files[index], whole[index][offset : offset + length]))
        appends.append((log.path, data[start:end]))
        start = end
    return appends


def test_a_kill_at_any_byte_loses_and_repeats_nothing(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    output = tmp_path / "whole" / "out.jsonl"
    with Journal(output, IDENTITY) as journal:
        fill(journal, range(1, 8))
    appends = written_in_order(output)
    whole = [path.read_bytes() for path in (output, journal.quarantine)]
    total = sum(len(data) for _, data in appends)
    for cut in range(0, total, 7):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / output.name).touch()
        left = cut
        for path, data in appends:
            with (folder / path.name).open("ab") as file:
                file.write(data[:left])
            left -= min(left, len(data))
            if not left:
                break
        with Journal(folder / output.name, IDENTITY) as journal:
            fill(journal, range(1, 8))
        assert list(contents(folder / output.name)) == whole, cut


def test_lines_that_a_power_cut_lost_run_again(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Journal(output, IDENTITY) as journal:
        for number in (1, 2):
            journal.answer(number, 5, line(number))
        journal.sync()
        for number in (4, 5, 7):
            journal.answer(number, 5, line(number))
    data = output.read_bytes()
    start = data.index(line(5))
    output.write_bytes(data[:start] + bytes(len(data) - start))
    with Journal(output, IDENTITY) as journal:
        assert [n for n in range(10) if journal.key_of(n)] == [1, 2, 4]
    assert output.read_bytes() == line(1) + line(2) + line(4)


def test_a_second_job_is_kept_out(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with (
        Journal(output, IDENTITY),
        pytest.raises(JobError, match=r"another job is writing .*out\.jsonl"),
    ):
        Journal(output, IDENTITY)
    Journal(output, IDENTITY).close()


def test_the_lock_is_the_kernels(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    Journal(output, IDENTITY).close()
    with journal_path(output).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(JobError, match="another job"):
            Journal(output, IDENTITY)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (JobIdentity("b", "input", IDENTITY.parameters), "the model was model and is b"),
        (JobIdentity("model", "b", IDENTITY.parameters), "the input's digest was input and is b"),
        (
            JobIdentity("model", "input", {"max_tokens": 9, "stop": ()}),
            "max_tokens was 16 and is 9",
        ),
    ],
)
def test_another_jobs_output_is_refused(tmp_path: Path, other: JobIdentity, reason: str) -> None:
    output = tmp_path / "out.jsonl"
    with Journal(output, IDENTITY) as journal:
        fill(journal, range(1, 4))
    before = contents(output)
    with pytest.raises(JobError, match=reason):
        Journal(output, other)
    assert contents(output) == before


def test_a_file_that_is_no_jobs_is_refused_and_kept(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    with pytest.raises(JobError, match="Choose another --output"):
        Journal(output, IDENTITY)
    assert output.read_text() == "mine\n"
    assert not journal_path(output).exists()


def test_a_deleted_output_is_noticed(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Journal(output, IDENTITY) as journal:
        fill(journal, range(1, 4))
        journal.sync()
    output.unlink()
    with pytest.raises(JobError, match="it was changed or deleted"):
        Journal(output, IDENTITY)


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    log = AppendFile(journal_path(output))
    log.append(frame({"headrace_job": 99}))
    log.close()
    with pytest.raises(JobError, match="not a job journal of version"):
        Journal(output, IDENTITY)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="nowhere does not exist"):
        Journal(tmp_path / "nowhere" / "out.jsonl", IDENTITY)


def test_an_unwritable_output_is_named(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.mkdir()
    with pytest.raises(JobError, match=r"cannot open .*out\.jsonl: Is a directory"):
        Journal(output, IDENTITY)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """A disk that is full after `size` bytes of a file (EFBIG instead of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Journal(output, IDENTITY) as journal:
        journal.answer(1, 5, line(1))
        with (
            files_limited_to(2048),
            pytest.raises(JobError, match=r"cannot write to .*out\.jsonl.*Every finished row is"),
        ):
            journal.answer(2, 5, line(4096))
    assert output.read_bytes() == line(1)
    with Journal(output, IDENTITY) as journal:
        assert journal.key_of(2) is None
        journal.answer(2, 5, line(4096))
    assert output.read_bytes() == line(1) + line(4096)
