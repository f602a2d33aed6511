"""Time the log of KV pages on a drive: spilling and fetching, in clear and encrypted.

    python benchmarks/kv_log.py [--directory DIR] [--pages 10KiB 640KiB 5MiB] [--total 512MiB] [--threads 2]
                                [--repeats 5] [--json FILE]

Beside it stands what the drive does with plain direct writes and reads of 8 MiB, by as many threads, of
as many bytes. All are measured in turns, so that a drive that slows down slows all of them; figures are
medians. Each has two: bytes of pages a second, and bytes of pages a second of processor time, user and
system together, which is what one core can do at most.
"""

import argparse
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace.cluster.cli.sizes import format_size, parse_size
from headrace.runtime.kv_log.keys import KeyRing
from headrace.runtime.kv_log.log import KVLog
from headrace.runtime.kv_log.segment import Disk

PLAIN_BYTES = 8 << 20
PUT_BYTES = 4 << 20
"""Small pages are put several at once, as a stage spills several of a pass."""
COHORT_BYTES = 64 << 20
SLOTS_BYTES = 256 << 20
"""Of memory that pages are in, as host slots: far more than a core's caches hold."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Gigabytes of pages a second of time, and a second of processor time."""

    what: str
    page: int
    write_gbps: float
    write_gbps_core: float
    read_gbps: float
    read_gbps_core: float
    amplification: float


class Stopwatch:
    """Seconds of time and of the process's processors since it was made."""

    def __init__(self) -> None:
        self._wall, self._core = time.perf_counter(), time.process_time()

    def gbps(self, nbytes: int) -> tuple[float, float]:
        wall, core = time.perf_counter() - self._wall, time.process_time() - self._core
        return nbytes / wall / 1e9, nbytes / max(core, 1e-9) / 1e9


def in_threads(pool: ThreadPoolExecutor, work: Callable[[int], None], count: int) -> None:
    for done in pool.map(work, range(count)):
        assert done is None


def plain(directory: Path, total: int, pool: ThreadPoolExecutor) -> Reading:
    """The drive alone: files of a thread each would be no faster, so that it is one file."""
    disk, file = Disk.probe(directory), directory / "plain"
    disk.write(file, 0, memoryview(mmap.mmap(-1, 4096)))  # makes the file
    memory = [mmap.mmap(-1, PLAIN_BYTES) for _ in range(total // PLAIN_BYTES)]
    for each in memory:
        each[:] = os.urandom(4096) * (PLAIN_BYTES // 4096)
    views = [memoryview(each) for each in memory]

    def write(i: int) -> None:
        disk.write(file, 4096 + i * PLAIN_BYTES, views[i])

    def read(i: int) -> None:
        assert disk.read(file, 4096 + i * PLAIN_BYTES, views[i]) == PLAIN_BYTES

    try:
        watch = Stopwatch()
        in_threads(pool, write, len(views))
        written = watch.gbps(len(views) * PLAIN_BYTES)
        watch = Stopwatch()
        in_threads(pool, read, len(views))
        return Reading("drive", PLAIN_BYTES, *written, *watch.gbps(len(views) * PLAIN_BYTES), 1.0)
    finally:
        file.unlink(missing_ok=True)


def spill_and_fetch(
    directory: Path, total: int, page: int, pool: ThreadPoolExecutor, keys: KeyRing | None
) -> Reading:
    """Cohorts of 64 MiB, put by threads in turn; then every page read back in another order."""
    count, at_once = total // page, max(PUT_BYTES // page, 1)
    num_slots = max(1, min(count, SLOTS_BYTES // page))
    source, dest = (memoryview(mmap.mmap(-1, num_slots * page)) for _ in range(2))
    source[:] = os.urandom(page) * num_slots
    dest[:] = bytes(len(dest))  # so that they are there
    names = [os.urandom(16) for _ in range(count)]
    a_cohort = max(COHORT_BYTES // page, at_once)
    groups = [range(i, min(i + at_once, count)) for i in range(0, count, at_once)]

    def slot(memory: memoryview, k: int) -> memoryview:
        return memory[k % num_slots * page :][:page]

    with KVLog.open(directory / "kv", b"benchmark", 4 * total + (1 << 30), keys=keys) as log:

        def put(i: int) -> None:
            group = groups[i]
            kept = log.put(group[0] // a_cohort, [(names[k], slot(source, k)) for k in group])
            assert len(kept) == len(group)

        def get(i: int) -> None:
            for k in groups[i]:
                assert log.get(names[-1 - k], slot(dest, k))

        watch = Stopwatch()
        in_threads(pool, put, len(groups))
        log.flush()
        written = watch.gbps(count * page)
        watch = Stopwatch()
        in_threads(pool, get, len(groups))
        read = watch.gbps(count * page)
        assert dest == source
        what = "clear" if keys is None else "encrypted"
        return Reading(what, page, *written, *read, log.stats.write_amplification)


def measure(
    directory: Path, total: int, pages: Sequence[int], threads: int, repeats: int
) -> Iterator[Reading]:
    """The medians, the drive's first."""
    rounds: list[list[Reading]] = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            one = [plain(directory, total, pool)]
            for page in pages:
                one.append(spill_and_fetch(directory, total, page, pool, None))
                one.append(spill_and_fetch(directory, total, page, pool, KeyRing()))
            rounds.append(one)
    for readings in zip(*rounds, strict=True):
        columns = zip(*(list(asdict(reading).values())[2:] for reading in readings), strict=True)
        yield Reading(readings[0].what, readings[0].page, *map(statistics.median, columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument(
        "--pages", nargs="+", type=parse_size, default=[10 << 10, 640 << 10, 5 << 20]
    )
    parser.add_argument("--total", type=parse_size, default=512 << 20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        readings = list(
            measure(Path(directory), options.total, options.pages, options.threads, options.repeats)
        )
    print(
        f"{format_size(options.total)} by {options.threads} threads in {options.directory}, GB/s:"
    )
    print(f"{'':22}{'write':>8}{'a core':>8}{'read':>8}{'a core':>8}{'bytes a byte':>14}")
    for reading in readings:
        name = f"{reading.what}, {format_size(reading.page)}"
        rates = (
            reading.write_gbps,
            reading.write_gbps_core,
            reading.read_gbps,
            reading.read_gbps_core,
        )
        cells = "".join(f"{rate:8.2f}" for rate in rates)
        print(f"{name:22}{cells}{reading.amplification:14.4f}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(reading) for reading in readings], indent=1))


if __name__ == "__main__":
    main()
