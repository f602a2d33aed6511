"""What the page cache holds and has room for, and files that are read into it ahead of use."""

import os
import time
from pathlib import Path

import pytest

from headrace.runtime.streaming.page_cache import ReadAhead, available_memory, cached_share

MiB = 1 << 20


def cold_file(file: Path, nbytes: int) -> Path:
    """A file of which the page cache holds nothing; skips where that cannot be had or seen."""
    with file.open("wb", buffering=0) as opened:
        opened.write(os.urandom(nbytes))
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, nbytes, os.POSIX_FADV_DONTNEED)
    if cached_share(file, 0, nbytes) != 0.0:
        pytest.skip("the filesystem keeps what it is told to drop, or does not tell")
    return file


def test_the_cached_share_is_seen_and_dropped(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(MiB))
    assert cached_share(file, 0, MiB) in (1.0, None)
    assert cached_share(tmp_path / "missing", 0, MiB) is None


def test_available_memory_obeys_a_container_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    limit = tmp_path / "memory.max"
    assert available_memory(meminfo, limit) == 50 * 1024
    limit.write_text("30000\n")
    (tmp_path / "memory.current").write_text("20000\n")
    (tmp_path / "memory.stat").write_text("anon 9000\ninactive_file 6000\nactive_file 4000\n")
    assert available_memory(meminfo, limit) == 20000
    limit.write_text("max\n")
    assert available_memory(meminfo, limit) == 50 * 1024


def test_what_is_read_ahead_is_in_the_cache(tmp_path: Path) -> None:
    files = [cold_file(tmp_path / str(i), 20 * MiB + 4096) for i in range(2)]
    with ReadAhead(files) as ahead:
        ahead.wait()
    assert [cached_share(file, 0, 20 * MiB + 4096) for file in files] == [1.0, 1.0]


def test_nothing_is_read_while_somebody_measures(tmp_path: Path) -> None:
    files = [cold_file(tmp_path / str(i), MiB) for i in range(40)]
    with ReadAhead(files) as ahead:
        with ahead.paused():
            before = [cached_share(file, 0, MiB) for file in files]
            time.sleep(0.2)
            assert [cached_share(file, 0, MiB) for file in files] == before
        ahead.wait()
    assert all(cached_share(file, 0, MiB) == 1.0 for file in files)


def test_a_file_that_cannot_be_read_is_left_to_its_reader(tmp_path: Path) -> None:
    with ReadAhead([tmp_path]) as ahead:
        ahead.wait()
