import logging
import os
import threading
from pathlib import Path

import pytest
from kv_logs import CAP, SEGMENT, get, good, key_of, on_drive, page_of, pages, run, segments

from headrace.runtime.kv_log.keys import KeyRing
from headrace.runtime.kv_log.log import KVLog
from headrace.runtime.kv_log.record import Miss
from headrace.runtime.kv_log.segment import Disk
from headrace.runtime.kv_log.start import max_page
from headrace.scheduler.errors import KVLogError


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["clear", "encrypted"])
def keys(request, tmp_path):
    return KeyRing(tmp_path / "keys.json") if request.param == "encrypted" else None


def opened(directory: Path, keys=None, **options) -> KVLog:
    options = {"cap": CAP, "segment_bytes": SEGMENT, **options}
    return KVLog.open(directory, b"model 1", keys=keys, **options)


@pytest.mark.parametrize("nbytes", [1, 4095, 10 << 10, 300_001])
def test_what_is_put_is_got(tmp_path, keys, nbytes):
    with opened(tmp_path / "kv", keys) as log:
        given = pages(range(40), nbytes)
        assert log.put(3, given) == [key for key, _ in given]
        assert good(log, range(40), nbytes) == [*range(40)]
        log.flush()
        assert good(log, range(40), nbytes) == [*range(40)]
        assert get(log, key_of("other"), nbytes) is None
        assert sorted(log.keys()) == sorted(key for key, _ in given)
        stats = log.stats
    assert stats.pages == 40
    assert stats.bytes_live == 40 * nbytes
    assert stats.hits == 80
    assert stats.misses == {miss: int(miss is Miss.ABSENT) for miss in Miss}
    assert stats.lost == stats.refused == stats.segments_dropped == 0


def test_a_large_page_in_a_large_segment(tmp_path, keys):
    nbytes = 20 << 20
    with KVLog.open(tmp_path, b"", 1 << 30, keys=keys) as log:
        assert len(log.put(0, pages(range(2), nbytes))) == 2
        assert good(log, range(2), nbytes) == [0, 1]
        assert log.stats.write_amplification < 1.001


@pytest.mark.parametrize("nbytes", [10 << 10, 100_000, 1 << 20])
def test_write_amplification(tmp_path, keys, nbytes):
    log = opened(tmp_path, keys, cap=CAP, segment_bytes=8 << 20, keep=True)
    for i in range((24 << 20) // nbytes):
        log.put(i % 2, pages([i], nbytes))
    log.close()
    stats = log.stats
    assert stats.payload_written == (24 << 20) // nbytes * nbytes
    assert stats.bytes_written == sum(file.stat().st_size for file in segments(tmp_path))
    assert 1 < stats.write_amplification <= 1.05


def test_small_pages_are_written_together(tmp_path):
    with opened(tmp_path) as log:
        for i in range(25):
            log.put(0, pages([i], 10 << 10))
        assert not segments(tmp_path)
        log.put(0, pages([25], 10 << 10))
        assert segments(tmp_path)[0].stat().st_size >= 256 << 10
        assert (
            log.stats.file_bytes
            == on_drive(tmp_path) - (tmp_path / "headrace-kv.lock").stat().st_blocks * 512
        )


def test_memory_of_a_put_may_change_afterwards(tmp_path):
    with opened(tmp_path) as log:
        for nbytes in (1000, 300_000):
            page = bytearray(b"a" * nbytes)
            log.put(0, [(key_of(nbytes), memoryview(page))])
            page[:] = b"b" * nbytes
            assert get(log, key_of(nbytes), nbytes) == b"a" * nbytes


def test_a_page_that_is_there_is_not_written_again(tmp_path):
    with opened(tmp_path) as log:
        first = log.put(0, pages(range(4), 200_000))
        written = log.stats.bytes_written
        assert log.put(1, pages(range(4), 200_000)) == first
        assert log.stats.bytes_written == written


def test_a_log_that_is_opened_again(tmp_path, keys):
    names = range(30)
    with opened(tmp_path / "kv", keys, keep=True) as log:
        log.put(0, pages(names[:20], 50_000), tenant="a")
        log.put(0, pages(names[20:], 50_000), tenant="b")
    assert log.close() is None
    with opened(tmp_path / "kv", keys, keep=True) as log:
        assert sorted(log.keys()) == sorted(map(key_of, names))
        assert good(log, names, 50_000) == [*names]
        assert log.stats.pages_recovered == 0
        # Cohort 0 of this run is another one.
        assert log.drop(0, tenant="a").pages == 0
        log.put(0, pages(["new"], 50_000), tenant="a")
        assert log.drop(0, tenant="a").pages_in_memory == 1
    with opened(tmp_path / "kv", keys) as log:
        assert good(log, names, 50_000) == [*names]
        deleted = log.close()
    assert deleted is not None
    assert (deleted.pages, deleted.tenants) == (30, ["a", "b"])
    assert not (tmp_path / "kv").exists() or not [*(tmp_path / "kv").iterdir()]


def test_another_identity_reads_nothing_and_deletes_nothing(tmp_path):
    with opened(tmp_path, keep=True) as log:
        log.put(0, pages(range(10), 100_000))
    with KVLog.open(tmp_path, b"model 2", CAP, segment_bytes=SEGMENT) as log:
        assert log.keys() == []
        assert log.stats.segments_locked == len(segments(tmp_path)) > 0
        assert good(log, range(10), 100_000) == []
    with opened(tmp_path) as log:
        assert good(log, range(10), 100_000) == [*range(10)]


def test_another_log_s_pages_go_first(tmp_path):
    with opened(tmp_path, keep=True) as log:
        log.put(0, pages(range(20), 100_000))
    with KVLog.open(tmp_path, b"model 2", 4 * SEGMENT, segment_bytes=SEGMENT) as log:
        for name in "abcdefgh":
            log.put(0, pages([name], 300_000))
        assert good(log, "abcdefgh", 300_000) == [*"abcdefgh"]


def test_a_directory_has_one_log(tmp_path):
    with (
        opened(tmp_path),
        pytest.raises(KVLogError, match=f"in use by process {os.getpid()}"),
    ):
        opened(tmp_path)
    opened(tmp_path).close()


def test_the_directory_is_ours_alone(tmp_path):
    with opened(tmp_path / "a" / "kv") as log:
        log.put(0, pages(range(4), 100_000))
        assert (tmp_path / "a" / "kv").stat().st_mode & 0o777 == 0o700
        assert segments(tmp_path / "a" / "kv")[0].stat().st_mode & 0o777 == 0o600


def test_what_is_not_ours_stays(tmp_path, caplog):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "segment-00000007.kv").write_text("mine, too")
    (tmp_path / "segment-00000009.kv").touch()  # what a process leaves that is killed at once
    with opened(tmp_path) as log:
        log.put(0, pages(range(4), 100_000))
        assert [file.name for file in segments(tmp_path)] == [
            "segment-00000007.kv",
            "segment-00000008.kv",
        ]
    assert "segment-00000007.kv has the name of a segment of KV pages, but is none" in caplog.text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt", "segment-00000007.kv"]


@pytest.mark.parametrize("nbytes", [20 << 10, 300_000])
def test_churn_stays_within_the_cap(tmp_path, keys, nbytes):
    cap = 4 << 20
    directory = tmp_path / "kv"
    most = 0
    with opened(directory, keys, cap=cap) as log:
        count = 20 * cap // nbytes
        for i in range(0, count, 8):
            log.put(i // 64, pages(range(i, i + 8), nbytes))
            most = max(most, on_drive(directory))
            assert good(log, [i], nbytes) == [i]
        stats = log.stats
        assert stats.segments_dropped > 60
        assert stats.write_amplification <= 1.05
        assert stats.lost == 0
        held = log.keys()
        assert cap // 2 < log.stats.bytes_live <= cap
        assert len(held) * nbytes < log.stats.bytes_live + cap // 2  # what waits
        # Nothing in the index is without its bytes.
        assert all(get(log, key, nbytes) == page_of(key, nbytes) for key in held)
    assert cap * 0.8 < most <= cap + SEGMENT
    assert not directory.exists()


def test_the_least_recently_used_cohort_goes_first(tmp_path):
    with opened(tmp_path, cap=4 * SEGMENT) as log:
        for cohort in range(3):
            log.put(cohort, pages([(cohort, i) for i in range(3)], 300_000))
        good(log, [(0, 0)], 300_000)
        log.put(3, pages([(3, i) for i in range(6)], 300_000))
        assert good(log, [(1, i) for i in range(3)], 300_000) == []
        assert len(good(log, [(0, i) for i in range(3)], 300_000)) == 3


def test_of_a_cohort_the_first_pages_go_last(tmp_path):
    """A sequence's pages are of use up to the first one that is missing."""
    with opened(tmp_path, cap=4 * SEGMENT) as log:
        log.put(0, pages(range(9), 300_000))
        log.put(0, pages(["waits"], 1000))
        log.put(1, pages("abcdef", 300_000))
        assert good(log, range(9), 300_000) == [*range(6)]
        assert good(log, ["waits"], 1000) == []


def test_a_cohort_larger_than_the_cap_loses_its_first_pages(tmp_path):
    with opened(tmp_path, cap=4 * SEGMENT) as log:
        for i in range(30):
            log.put(0, pages([i], 300_000))
        held = good(log, range(30), 300_000)
        assert held == [*range(30 - len(held), 30)]
        assert len(held) > 6


def test_waiting_pages_take_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("headrace.runtime.kv_log.intake.KV_LOG_BYTES", 500_000)
    with opened(tmp_path) as log:
        for cohort in range(100):
            log.put(cohort, pages([cohort], 20_000))
            in_memory = log.stats.pages * 20_000 - log.stats.bytes_live
            assert in_memory <= 500_000
        assert good(log, range(100), 20_000) == [*range(100)]


def test_pages_expire(tmp_path):
    clock = Clock()
    with opened(tmp_path, ttl=60, clock=clock) as log:
        log.put(0, pages(["old"], 300_000))
        log.put(1, pages(["waiting"], 1000))
        clock.now += 59
        log.put(0, pages(["new"], 300_000))
        assert good(log, ["old", "new"], 300_000) == ["old", "new"]
        assert good(log, ["waiting"], 1000) == ["waiting"]
        clock.now += 1
        # A segment lives as long as its oldest page: nothing outlives its time.
        assert good(log, ["old", "new"], 300_000) == []
        assert good(log, ["waiting"], 1000) == []
        assert segments(tmp_path) == []
        log.put(0, pages(["old"], 300_000))
        assert good(log, ["old"], 300_000) == ["old"]


def test_expired_pages_go_at_start(tmp_path):
    clock = Clock()
    with opened(tmp_path, keep=True, clock=clock) as log:
        log.put(0, pages(["old"], 300_000))
    clock.now += 100
    with opened(tmp_path, keep=True, ttl=60, clock=clock) as log:
        assert log.keys() == []
        assert segments(tmp_path) == []


def test_dropping_a_cohort(tmp_path, keys):
    with opened(tmp_path / "kv", keys) as log:
        log.put(1, pages(range(5), 300_000))
        log.put(1, pages(["waits"], 1000))
        log.put(2, pages("abc", 300_000))
        deleted = log.drop(1)
        assert (deleted.pages, deleted.bytes, deleted.segments) == (5, 1_500_000, 2)
        assert deleted.pages_in_memory == 1
        assert len(deleted.digest) == 64
        assert not deleted.key_destroyed
        assert deleted.encrypted == (keys is not None)
        assert good(log, range(5), 300_000) == []
        assert good(log, "abc", 300_000) == [*"abc"]
        assert log.stats.file_bytes == sum(f.stat().st_size for f in segments(tmp_path / "kv"))
        log.put(1, pages(range(2), 300_000))
        assert good(log, range(2), 300_000) == [0, 1]


def test_purging_a_tenant_destroys_its_key(tmp_path, keys):
    with opened(tmp_path / "kv", keys, keep=True) as log:
        log.put(1, pages("ab", 300_000), tenant="job 1")
        log.put(1, pages("cd", 300_000), tenant="job 2")
    with opened(tmp_path / "kv", keys, keep=True) as log:
        log.put(1, pages("e", 300_000), tenant="job 1")
        before = keys.find("job 1") if keys else None
        deleted = log.purge("job 1")
        assert (deleted.what, deleted.tenants) == ("tenant job 1", ["job 1"])
        assert (deleted.pages, deleted.segments) == (3, 2)
        assert deleted.key_destroyed == (keys is not None)
        assert good(log, "abcde", 300_000) == ["c", "d"]
        if keys:
            assert KeyRing(keys.file).tenants() == ["job 2"]
        log.put(1, pages("a", 300_000), tenant="job 1")
        assert good(log, "a", 300_000) == ["a"]
        assert keys is None or keys.find("job 1") != before


def test_receipts_tell_different_contents_apart(tmp_path):
    digests = set()
    for names in ("ab", "ac"):
        with opened(tmp_path / names) as log:
            log.put(1, pages(names, 300_000))
            digests.add(log.drop(1).digest)
    assert len(digests) == 2


def test_keys_in_memory_end_with_the_log(tmp_path):
    keys = KeyRing()
    with opened(tmp_path, keys) as log:
        log.put(0, pages(range(3), 300_000))
        deleted = log.close()
    assert deleted is not None
    assert deleted.key_destroyed
    assert keys.tenants() == []
    assert [*tmp_path.iterdir()] == []


def test_orphans_whose_key_is_gone_are_swept(tmp_path):
    run(
        """
import os, sys
from pathlib import Path
from kv_logs import pages
from headrace.runtime.kv_log.keys import KeyRing
from headrace.runtime.kv_log.log import KVLog
log = KVLog.open(Path(sys.argv[1]), b"model 1", 64 << 20, segment_bytes=1 << 20, keys=KeyRing())
log.put(0, pages(range(10), 300_000))
os._exit(0)
""",
        tmp_path,
    )
    assert len(segments(tmp_path)) == 4
    with opened(tmp_path, KeyRing()) as log:
        assert segments(tmp_path) == []
        assert log.stats.segments_locked == 0


def test_pages_in_clear_do_not_stay_in_an_encrypted_log(tmp_path):
    with opened(tmp_path / "kv", keep=True) as log:
        log.put(0, pages(range(4), 300_000))
    with opened(tmp_path / "kv", KeyRing(tmp_path / "keys"), keep=True) as log:
        assert log.keys() == []
        assert segments(tmp_path / "kv") == []


def test_nothing_on_the_drive_can_be_read_without_the_key(tmp_path):
    nbytes = 20_000
    with opened(tmp_path / "kv", KeyRing(), cap=CAP) as log:
        log.put(0, pages(range(50), nbytes), tenant="t")
        log.flush()
        stored = b"".join(file.read_bytes() for file in segments(tmp_path / "kv"))
    assert len(stored) > 50 * nbytes
    for i in range(50):
        key = key_of(i)
        page = page_of(key, nbytes)
        assert key not in stored
        assert not any(page[at : at + 16] in stored for at in range(0, nbytes - 16, 997))


def test_the_daily_budget_refuses(tmp_path, caplog):
    clock = Clock()
    with opened(tmp_path, daily_writes=1_000_000, clock=clock) as log:
        assert len(log.put(0, pages("abc", 300_000))) == 3
        assert log.put(0, pages("de", 300_000)) == []
        assert log.put(0, pages("f", 300_000)) == []
        assert log.stats.refused == 3
        assert good(log, "abcdef", 300_000) == [*"abc"]
        assert caplog.text.count("bytes a day") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["headrace-kv-writes.json"]
    clock.now += 3600
    with opened(tmp_path, daily_writes=1_000_000, clock=clock) as log:
        assert log.put(0, pages("d", 300_000)) == []
        clock.now += 24 * 3600
        assert len(log.put(0, pages("d", 300_000))) == 1


def test_threads(tmp_path, keys):
    """Puts, gets and drops at once: no wrong bytes, no page lost, the cap kept, the books right."""
    directory, nbytes, cap = tmp_path / "kv", 40_000, 12 << 20
    failures: list[Exception] = []
    most = 0

    def work(log: KVLog, me: int) -> None:
        try:
            for i in range(60):
                cohort = i // 10
                log.put(100 * me + cohort, pages([(me, i, j) for j in range(8)], nbytes))
                log.put(cohort, pages([("shared", i)], nbytes))
                good(log, [(me, i, 0), (me, i // 2, 1), ("shared", i), ("shared", i // 2)], nbytes)
                if i % 20 == 19:
                    log.drop(100 * me + cohort - 1)
        except Exception as error:  # noqa: BLE001 - of a thread, shown below
            failures.append(error)

    with opened(directory, keys, cap=cap) as log:
        threads = [threading.Thread(target=work, args=(log, me)) for me in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most = max(most, on_drive(directory))
        assert not failures
        log.flush()
        stats, held = log.stats, log.keys()
        assert stats.lost == 0
        assert all(not stats.misses[miss] for miss in Miss if miss is not Miss.ABSENT)
        assert stats.file_bytes == sum(file.stat().st_size for file in segments(directory))
        assert all(get(log, key, nbytes) == page_of(key, nbytes) for key in held)
    assert most <= cap + SEGMENT
    assert not directory.exists()


def test_without_direct_io(tmp_path, keys, monkeypatch, caplog):
    """As on a filesystem that refuses O_DIRECT."""
    monkeypatch.setattr("headrace.runtime.kv_log.segment._takes_direct", lambda directory: False)
    caplog.set_level(logging.INFO, logger="headrace")
    with opened(tmp_path / "kv", keys) as log:
        log.put(0, pages(range(20), 100_000))
        assert good(log, range(20), 100_000) == [*range(20)]
    assert caplog.text.count("through the page cache") == 1


def test_direct_io_is_found(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="headrace")
    disk = Disk.probe(tmp_path)
    assert caplog.text.count("O_DIRECT") == 1
    assert ("no O_DIRECT" in caplog.text) == (not disk.direct)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cap": SEGMENT}, "no room for two segments"),
        ({"segment_bytes": 1000}, "segments have at least 1048576"),
        ({"ttl": 0}, "positive number of seconds"),
        ({"daily_writes": 0}, "positive number of bytes"),
        ({"keep": True, "keys": KeyRing()}, "give the key ring a file"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, **options)
    opened(tmp_path).close()  # it is not locked


def test_arguments_that_cannot_be(tmp_path):
    with opened(tmp_path) as log:
        with pytest.raises(ValueError, match="key has 16 bytes, not 3"):
            log.put(0, [(b"key", memoryview(b"page"))])
        with pytest.raises(ValueError, match="a page has 1 to"):
            log.put(0, [(key_of(0), memoryview(bytes(SEGMENT)))])
        with pytest.raises(ValueError, match="a tenant's name"):
            log.put(0, pages([0], 100), tenant="")
        log.put(0, pages([0], 100))
        with pytest.raises(ValueError, match="the page has 100 bytes"):
            log.get(key_of(0), memoryview(bytearray(99)))
        log.flush()
        with pytest.raises(ValueError, match="the page has 100 bytes"):
            log.get(key_of(0), memoryview(bytearray(99)))
        assert log.drop(0).pages == 1


def test_the_largest_page(tmp_path, keys):
    nbytes = max_page(SEGMENT)
    with opened(tmp_path / "kv", keys) as log:
        assert len(log.put(0, pages(range(3), nbytes))) == 3
        assert good(log, range(3), nbytes) == [0, 1, 2]
        assert all(file.stat().st_size <= SEGMENT for file in segments(tmp_path / "kv"))


def test_a_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "kv"):
        with pytest.raises(KVLogError):
            opened(path)
