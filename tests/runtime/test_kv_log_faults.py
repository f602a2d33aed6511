"""Whatever happens to its files, a KV log gives the right bytes or none."""

import os
import random
import re
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
from kv_logs import (
    CAP,
    SEGMENT,
    environment,
    get,
    good,
    key_of,
    page_of,
    pages,
    run,
    script,
    segments,
)

from headrace.runtime.kv_log.keys import KeyRing
from headrace.runtime.kv_log.log import KVLog
from headrace.runtime.kv_log.record import BLOCK, HEAD_BYTES, Miss, pack_head, unpack_head
from headrace.runtime.kv_log.segment import Disk, scan

NBYTES = 60_000
NAMES = range(24)


@pytest.fixture(params=["clear", "encrypted"])
def keys(request, tmp_path):
    return KeyRing(tmp_path / "keys.json") if request.param == "encrypted" else None


@pytest.fixture
def memory(tmp_path):
    """A directory in memory if there is one: tests that rewrite files wait for the drive otherwise."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def opened(directory: Path, keys=None, *, keep: bool = True) -> KVLog:
    return KVLog.open(directory, b"id", CAP, segment_bytes=SEGMENT, keys=keys, keep=keep)


def filled(directory: Path, keys=None) -> Path:
    """A directory with sealed segments; their first one."""
    with opened(directory, keys) as log:
        log.put(0, pages(NAMES, NBYTES))
    assert len(segments(directory)) == 2
    return segments(directory)[0]


def change(file: Path, at: int, data: bytes | None = None) -> None:
    """Write `data`, by default one flipped byte."""
    with file.open("r+b") as opened_file:
        opened_file.seek(at)
        before = opened_file.read(1)
        opened_file.seek(at)
        opened_file.write(bytes([before[0] ^ 0x40]) if data is None else data)


def misses(log: KVLog) -> dict[Miss, int]:
    return {miss: count for miss, count in log.stats.misses.items() if count}


def places(file: Path) -> dict[str, int]:
    """An offset for every kind of place in a sealed segment."""
    found = scan(file, 0)
    assert found is not None
    assert found.sealed
    entry = found.entries[3]
    page = entry.offset + HEAD_BYTES
    tag = 16 if found.encrypted else 0
    last = found.entries[-1]
    padding = last.offset + HEAD_BYTES + last.nbytes + tag
    assert padding % BLOCK
    head = {f"byte {i} of a head": entry.offset + i for i in range(0, 100, 3)}
    header = {f"byte {i} of the header": i for i in (0, 8, 11, 15, 25, 60)}
    return {
        **header,
        "behind the header": BLOCK - 1,
        **head,
        "first byte of a page": page,
        "middle of a page": page + entry.nbytes // 2,
        "last byte of a page": page + entry.nbytes - 1,
        "end of what is stored": page + entry.nbytes - 1 + tag,
        "padding": padding,
        "first entry of the footer": padding // BLOCK * BLOCK + BLOCK + 3,
        "offset in the footer": padding // BLOCK * BLOCK + BLOCK + 17,
        "end of the footer": file.stat().st_size - 1,
        "sums in the footer": file.stat().st_size - 30,
    }


def test_a_flipped_byte_anywhere(memory, keys):
    file = filled(memory / "kv", keys)
    pristine = file.read_bytes()
    in_file = len(scan(file, 0).entries)  # type: ignore[union-attr]
    for place, offset in places(file).items():
        change(file, offset)
        with opened(memory / "kv", keys) as log:
            found = good(log, NAMES, NBYTES)
            lost, reasons = len(NAMES) - len(found), misses(log)
            assert good(log, NAMES, NBYTES) == found
            held = len(log.keys())
        if "header" in place and "behind" not in place:
            assert lost == in_file, place
            assert reasons == {Miss.ABSENT: in_file}, place
        elif "page" in place or "stored" in place:
            assert (lost, reasons) == (1, {Miss.DAMAGED: 1}), place
        elif "head" in place and "header" not in place:
            # Past the fields there is padding, which nobody reads.
            assert lost <= 1, place
            assert set(reasons) <= {Miss.DAMAGED}, place
        else:
            assert lost == 0, place  # a damaged footer is replaced by a walk
        assert held == len(found)
        file.write_bytes(pristine)


def test_a_flipped_byte_under_an_open_log(tmp_path, keys):
    with opened(tmp_path / "kv", keys) as log:
        log.put(0, pages(NAMES, NBYTES))
        file = segments(tmp_path / "kv")[0]
        entry = scan(file, 0).entries[2]  # type: ignore[union-attr]
        change(file, entry.offset + HEAD_BYTES + 1000)
        found = good(log, NAMES, NBYTES)
        assert len(found) == len(NAMES) - 1
        assert misses(log) == {Miss.DAMAGED: 1}
        # It is forgotten, and can be put again.
        lost = next(name for name in NAMES if name not in found)
        assert key_of(lost) not in {*log.keys()}
        log.put(0, pages([lost], NBYTES))
        assert good(log, NAMES, NBYTES) == [*NAMES]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.99])
def test_a_truncated_segment(tmp_path, keys, share):
    file = filled(tmp_path / "kv", keys)
    size = int(file.stat().st_size * share)
    with file.open("r+b") as cut:
        cut.truncate(size)
    with opened(tmp_path / "kv", keys) as log:
        found = good(log, NAMES, NBYTES)
        assert len(NAMES) - 17 <= len(found)
        assert len(found) >= len(NAMES) - 17 + size // (NBYTES + 500) - 1


def test_a_truncated_segment_under_an_open_log(tmp_path, keys):
    with opened(tmp_path / "kv", keys) as log:
        log.put(0, pages(NAMES, NBYTES))
        file = segments(tmp_path / "kv")[0]
        with file.open("r+b") as cut:
            cut.truncate(file.stat().st_size // 2 + 100)
        before = len(good(log, NAMES, NBYTES))
        file.unlink()
        after = len(good(log, NAMES, NBYTES))
        assert before > after > 0
        counted = misses(log)
        assert counted[Miss.DAMAGED] == len(NAMES) - before
        assert counted[Miss.IO] == before - after


def test_a_record_of_another_generation_is_stale(tmp_path, keys):
    """A segment's name came back: with the same page at the same place, and checksums that hold."""
    with opened(tmp_path / "kv", keys) as log:
        log.put(0, pages(NAMES, NBYTES))
        log.flush()
        old = {file: file.read_bytes() for file in segments(tmp_path / "kv")}
        log.drop(0)
    with opened(tmp_path / "kv", keys) as log:
        log.put(0, pages(NAMES, NBYTES))
        log.flush()
        assert segments(tmp_path / "kv") == [*old]
        assert good(log, NAMES, NBYTES) == [*NAMES]
        for file, content in old.items():
            file.write_bytes(content)
        assert good(log, NAMES, NBYTES) == []
        assert misses(log) == {Miss.STALE: len(NAMES)}


def test_records_of_another_generation_in_a_segment_that_was_not_sealed(tmp_path):
    file = filled(tmp_path)
    stray = file.read_bytes()[BLOCK : BLOCK + 3 * (NBYTES + HEAD_BYTES)]
    other = segments(tmp_path)[1]
    found = scan(other, 1)
    assert found is not None
    with other.open("r+b") as cut:
        cut.truncate(found.entries[-1].offset // BLOCK * BLOCK + BLOCK * 16)
    with other.open("ab") as longer:
        longer.write(stray)
    with opened(tmp_path) as log:
        assert good(log, NAMES, NBYTES) == [*NAMES]
        assert log.stats.pages_recovered == len(found.entries)


def tamper(file: Path, index: int) -> None:
    """Change a page and make the checksums hold again, as an attacker would."""
    found = scan(file, 0)
    assert found is not None
    entry = found.entries[index]
    stored = entry.nbytes + (16 if found.encrypted else 0)
    change(file, entry.offset + HEAD_BYTES + 777)
    with file.open("r+b") as changed:
        changed.seek(entry.offset)
        record = changed.read(HEAD_BYTES + stored)
        fields = _body(record)
        head, _ = pack_head(fields, memoryview(record)[HEAD_BYTES:])
        changed.seek(entry.offset)
        changed.write(head)


def _body(record: bytes) -> bytes:
    unpacked = unpack_head(record[:HEAD_BYTES])
    assert unpacked is not None
    return unpacked[1]


def test_what_was_tampered_with_is_a_miss(tmp_path):
    keys = KeyRing(tmp_path / "keys")
    file = filled(tmp_path / "kv", keys)
    tamper(file, 5)
    with opened(tmp_path / "kv", keys) as log:
        assert len(good(log, NAMES, NBYTES)) == len(NAMES) - 1
        assert misses(log) == {Miss.UNAUTHENTIC: 1}


def test_a_page_under_another_page_s_key_is_a_miss(tmp_path):
    """Two records of a segment, whole, in each other's place."""
    keys = KeyRing(tmp_path / "keys")
    file = filled(tmp_path / "kv", keys)
    found = scan(file, 0)
    assert found is not None
    first, second = found.entries[:2]
    content = file.read_bytes()
    length = second.offset - first.offset
    change(file, first.offset, content[second.offset : second.offset + length])
    change(file, second.offset, content[first.offset : second.offset])
    with opened(tmp_path / "kv", keys) as log:
        assert len(good(log, NAMES, NBYTES)) == len(NAMES) - 2
        assert misses(log) == {Miss.DAMAGED: 2}


@pytest.mark.parametrize("which", ["another file", "in memory", "none"])
def test_the_wrong_key(tmp_path, which):
    filled(tmp_path / "kv", KeyRing(tmp_path / "keys"))
    wrong = {"another file": KeyRing(tmp_path / "other"), "in memory": KeyRing(), "none": None}
    keys = wrong[which]
    with opened(tmp_path / "kv", keys, keep=which == "another file") as log:
        assert log.stats.segments_locked == 2
        assert good(log, NAMES, NBYTES) == []
        assert misses(log) == {Miss.ABSENT: len(NAMES)}
        log.put(0, pages(["mine"], NBYTES))
        assert good(log, ["mine"], NBYTES) == ["mine"]
        deleted = log.purge("default")
        assert deleted.pages == len(NAMES)
        assert not deleted.key_destroyed  # not of those that it could not read
        assert segments(tmp_path / "kv") == []


SPILL = """
import sys
from pathlib import Path
from kv_logs import pages
from headrace.runtime.kv_log.keys import KeyRing
from headrace.runtime.kv_log.log import KVLog
directory, keys = Path(sys.argv[1]), KeyRing(Path(sys.argv[2])) if sys.argv[2] else None
log = KVLog.open(directory, b"id", 64 << 20, segment_bytes=1 << 20, keys=keys, keep=True)
for i in range(10**6):
    log.put(i // 10 % 3, pages([(i, "small")], 5_000))
    kept = log.put(i // 10 % 3, pages([(i, j) for j in range(3)], 100_000))
    if len(log.keys()) < 500:
        print(i, len(kept), flush=True)
"""


@pytest.mark.parametrize("after", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 30))])
def test_a_process_that_is_killed_while_it_spills(tmp_path, keys, after):
    arguments = (tmp_path / "kv", keys.file if keys else "")
    with subprocess.Popen(
        script(SPILL, *arguments), env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().split() for _ in range(after)]
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert all(count == "3" for _, count in lines)
    ring = KeyRing(keys.file) if keys else None
    with opened(tmp_path / "kv", ring, keep=False) as log:
        wanted = [(int(i), j) for i, _ in lines for j in range(3)]
        assert good(log, wanted, 100_000) == wanted
        assert log.stats.pages_recovered >= len(wanted[-3:])
        # What is said to be there is there, and no half of a page.
        sizes = {key_of((i, "small")): 5_000 for i in range(2000)}
        held = log.keys()
        for key in held:
            nbytes = sizes.get(key, 100_000)
            page = get(log, key, nbytes)
            assert page is None or page == page_of(key, nbytes)
        assert log.stats.misses[Miss.DAMAGED] <= 3
        log.put(0, pages(["after"], 300_000))
        assert good(log, ["after"], 300_000) == ["after"]
    assert not (tmp_path / "kv").exists() or not [*(tmp_path / "kv").iterdir()]


FULL = """
import sys
from pathlib import Path
from kv_logs import good, pages, segments
from headrace.runtime.kv_log.log import KVLog
directory = Path(sys.argv[1])
{before}
with KVLog.open(directory, b"id", 64 << 20, segment_bytes=2 << 20, keep=True) as log:
    kept = [name for name in range(60) if log.put(name // 20, pages([name], 300_000))]
    assert kept == good(log, range(60), 300_000)
    stats = log.stats
    assert stats.lost == 60 - len(kept) > 0
    log.drop(0)
    assert len(log.put(5, pages(["after"], 300_000))) == 1
    assert good(log, ["after"], 300_000) == ["after"]
with KVLog.open(directory, b"id", 64 << 20, segment_bytes=2 << 20) as log:
    again = good(log, range(60), 300_000)
    assert again == [name for name in kept if name >= 20], (kept, again)
assert not segments(directory)
print("kept", len(kept))
"""


def test_a_full_disk(tmp_path):
    """A small tmpfs, in a mount namespace of the process's own."""
    mounted = f"mount -t tmpfs -o size=8m none {tmp_path}"
    able = subprocess.run(["unshare", "-m", "sh", "-c", mounted], capture_output=True, check=False)
    if able.returncode:
        pytest.skip("this user may not mount a tmpfs")
    body = FULL.format(before="")
    python = script(body, tmp_path)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mounted} && exec "$@"', "sh", *python],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kept = re.fullmatch(r"kept (\d+)\n", done.stdout)
    assert kept is not None
    assert 20 <= int(kept[1]) <= 27
    assert done.stderr.count("No space left on device: make room") == 1


def test_files_that_may_not_grow(tmp_path):
    """A limit that every user may set: writes beyond a megabyte of a file fail."""
    output = run(
        FULL.format(
            before="import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))",
        ),
        tmp_path,
    )
    assert int(output.split()[1]) >= 30


@pytest.mark.parametrize("seed", [1, 2])
def test_a_thousand_faults(memory, keys, seed):
    """250 each, in files of a closed or an open log; every page right or missing, and nothing raised."""
    chance, directory, nbytes = random.Random(seed), memory / "kv", 20_000
    with opened(directory, keys) as log:
        log.put(0, pages(NAMES[:12], nbytes))
        log.put(1, pages(NAMES[12:], nbytes))
    pristine = {file: file.read_bytes() for file in segments(directory)}
    lost = 0
    for _ in range(250):
        early = chance.random() < 0.5
        if early:
            _break(chance, directory)
        with opened(directory, keys) as log:
            if not early:
                _break(chance, directory)
            lost += len(NAMES) - len(good(log, NAMES, nbytes))
        for file, content in pristine.items():
            file.write_bytes(content)
        assert segments(directory) == [*pristine]
    assert 250 < lost < 250 * len(NAMES) // 2
    with opened(directory, keys) as log:
        assert good(log, NAMES, nbytes) == [*NAMES]


def _break(chance: random.Random, directory: Path) -> None:
    file, other = chance.sample(segments(directory), 2)
    content = bytearray(file.read_bytes())
    at = chance.randrange(len(content))
    block = at // BLOCK * BLOCK
    match chance.randrange(9):
        case 0 | 1:
            content[at] ^= 1 << chance.randrange(8)
        case 2:
            content[block : block + BLOCK] = bytes(BLOCK)
        case 3:
            content[block : block + BLOCK] = chance.randbytes(BLOCK)
        case 4:
            del content[at:]
        case 5:
            content += chance.randbytes(chance.randrange(3 * BLOCK))
        case 6:
            source = chance.randrange(len(content)) // BLOCK * BLOCK
            length = chance.randrange(1, 30) * BLOCK
            content[block : block + length] = content[source : source + length]
        case 7:
            content = bytearray(other.read_bytes())
        case 8:
            file.unlink()
            return
    file.write_bytes(content)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_left_after_a_fault(tmp_path, keys, seed):
    """But for a file whose magic is gone: it might be anyone's."""
    filled(tmp_path / "kv", keys)
    _break(random.Random(seed), tmp_path / "kv")
    opened(tmp_path / "kv", keys, keep=False).close()
    left = segments(tmp_path / "kv")
    assert not any(file.read_bytes().startswith(b"HRKVSEG") for file in left)


def test_a_segment_that_lost_its_header(tmp_path, keys):
    file = filled(tmp_path / "kv", keys)
    change(file, 0, bytes(BLOCK))
    with opened(tmp_path / "kv", keys) as log:
        assert not file.exists()
        assert 0 < len(good(log, NAMES, NBYTES)) < len(NAMES)


def test_a_name_that_is_taken_meanwhile(tmp_path, keys):
    """Another's file is neither overwritten nor deleted."""
    with opened(tmp_path / "kv", keys, keep=False) as log:
        log.put(0, pages(["a"], 300_000))
        taken = tmp_path / "kv" / "segment-00000001.kv"
        taken.write_text("mine")
        assert log.put(1, pages(["b"], 300_000)) == []
        assert log.put(1, pages(["b"], 300_000)) == [key_of("b")]
        assert good(log, "ab", 300_000) == ["a", "b"]
        assert log.stats.lost == 1
    assert segments(tmp_path / "kv") == [taken]
    assert taken.read_text() == "mine"


def test_a_segment_that_is_deleted_under_an_open_log(tmp_path):
    with opened(tmp_path, keep=False) as log:
        log.put(0, pages(["a"], 300_000))
        segments(tmp_path)[0].unlink()
        assert log.put(0, pages(["b"], 300_000)) == []
        assert segments(tmp_path) == []  # no file without a header
        assert log.put(0, pages(["b"], 300_000)) == [key_of("b")]
        assert good(log, "ab", 300_000) == ["b"]


def test_the_header_comes_before_all_else(tmp_path, monkeypatch):
    """However threads race for a new segment: a file without a header would be nobody's."""
    write, first = Disk.write, threading.Event()

    def slow(self, file, offset, data):
        if not offset:
            first.set()
            time.sleep(0.1)
        assert not offset or file.exists()
        write(self, file, offset, data)

    monkeypatch.setattr(Disk, "write", slow)
    with opened(tmp_path, keep=False) as log:
        threads = [
            threading.Thread(target=log.put, args=(0, pages([i], 300_000))) for i in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert first.is_set()
        assert len(segments(tmp_path)) == 1
        assert good(log, range(3), 300_000) == [0, 1, 2]
