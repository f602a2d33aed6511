"""What of this process is in RAM: real memory, as the kernel counts it."""

import mmap
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.runtime.memory.held import parts_of
from headrace.runtime.memory.message import Measured
from headrace.runtime.memory.process import mappings, measure_process, peak_bytes, reset_peak
from headrace.runtime.memory.resident import PAGE_BYTES, Extents, resident_bytes

MIB = 1 << 20

extents = st.tuples(st.integers(0, 60), st.integers(0, 20))


def mapped(nbytes: int) -> torch.Tensor:
    """Memory that nobody has touched. Small pages: with huge ones, more comes than is asked for."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


@given(st.lists(extents, max_size=12))
def test_each_address_counts_once(asked: list[tuple[int, int]]) -> None:
    counted, seen = Extents(), set[int]()
    for start, nbytes in asked:
        own = set(range(start, start + nbytes))
        new = [range(begin, begin + size) for begin, size in counted.add(start, nbytes)]
        assert {address for some in new for address in some} == own - seen
        assert sum(map(len, new)) == len(own - seen)
        assert all(a.stop < b.start for a, b in pairwise(new))
        seen |= own


def test_only_pages_that_were_written_are_in_ram() -> None:
    memory = mapped(8 * MIB)
    where = memory.data_ptr()
    assert resident_bytes([(where, memory.nbytes)]) == 0
    memory[: 3 * MIB] = 1
    assert resident_bytes([(where, memory.nbytes)]) == 3 * MIB
    assert int(memory.sum()) == 3 * MIB  # reads the rest: pages of zeros, which take nothing
    assert resident_bytes([(where, memory.nbytes)]) == 3 * MIB


def test_of_a_page_at_an_end_only_what_is_inside_counts() -> None:
    memory = mapped(4 * PAGE_BYTES)
    memory[:] = 1
    assert resident_bytes([(memory.data_ptr() + 100, 2 * PAGE_BYTES)]) == 2 * PAGE_BYTES
    assert resident_bytes([(memory.data_ptr() + 100, 50)]) == 50


def test_parts_by_name_where_views_count_once() -> None:
    memory, array = mapped(4 * MIB), np.ones(MIB, np.uint8)
    memory[: 2 * MIB] = 1
    parts = parts_of(
        [
            ("ring", memory[: 3 * MIB]),
            ("kv", memory.view(4, MIB)[:, :100]),  # reaches into the last quarter
            ("tables", array[::2]),
            ("ring", memory[MIB : 2 * MIB]),
            ("kv", torch.empty(0)),
        ]
    )
    assert [(part.name, part.nbytes) for part in parts] == [
        ("ring", 3 * MIB),
        ("kv", 100),
        ("tables", MIB - 1),
    ]
    assert [part.resident for part in parts] == [2 * MIB, 0, MIB - 1]


def test_a_process_adds_up() -> None:
    before = Measured(measure_process())
    memory = mapped(64 * MIB)
    memory[:] = 1
    process = measure_process()
    assert process.rss == process.anonymous + sum(
        one.rss for one in (*process.files, *process.shared)
    )
    assert process.uss <= process.pss <= process.rss <= process.peak
    assert {one.kind for one in process.files} >= {"torch", "numpy", "system"}
    assert abs(process.anonymous - before.process.anonymous - 64 * MIB) < 4 * MIB
    after = Measured(process, parts_of([("memory", memory)]))
    assert after.held == 64 * MIB
    assert abs(after.own - before.own) < 4 * MIB
    assert process.threads >= 1 and process.stacks > 0


def test_peaks_begin_anew() -> None:
    memory = mapped(64 * MIB)
    memory[:] = 1
    high = peak_bytes()
    del memory
    assert peak_bytes() >= high - MIB
    if reset_peak():
        assert peak_bytes() < high - 32 * MIB


def test_mappings_of_a_recorded_process() -> None:
    recorded = """\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
Rss:                 512 kB
Pss:                 512 kB
VmFlags: rd wr mr mw me ac
7f0000400000-7f0000500000 r-xp 00001000 08:01 42    /usr/lib/a file (deleted)
Rss:                  64 kB
Pss:                   8 kB
7f0000600000-7f0000700000 rw-s 00000000 00:19 7                          /dev/shm/plasma
Rss:                   4 kB
Pss:                   2 kB
"""
    own, file, shared = mappings(recorded)
    assert (own.rss, own.is_anonymous) == (512 * 1024, True)
    assert (file.path, file.pss, file.is_shared_memory) == (
        "/usr/lib/a file (deleted)",
        8 * 1024,
        False,
    )
    assert shared.is_shared_memory and not shared.is_anonymous
