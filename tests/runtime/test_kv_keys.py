import itertools
import os
import stat
import threading

import pytest
from kv_logs import SEGMENT, get, key_of, page_of, pages, segments

from headrace.runtime.kv_log.keys import KeyRing, SegmentCipher
from headrace.runtime.kv_log.log import KVLog
from headrace.runtime.kv_log.record import BLOCK, Head, SegmentHeader, unpack_head
from headrace.runtime.kv_log.segment import scan
from headrace.scheduler.errors import HeadraceError


def test_keys_in_memory():
    with KeyRing() as keys:
        assert keys.find("a") is None
        first = keys.key("a")
        assert len(first) == 32
        assert keys.key("a") == keys.find("a") == first != keys.key("b")
        assert keys.destroy("a")
        assert not keys.destroy("a")
        assert keys.tenants() == ["b"]
        assert keys.key("a") != first
    assert keys.tenants() == []


def test_keys_in_a_file(tmp_path):
    file = tmp_path / "keys.json"
    with KeyRing(file) as keys:
        assert not file.exists()
        first = keys.key("a")
        keys.key("b")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = KeyRing(file)
    assert again.find("a") == first
    assert again.destroy("a")
    assert KeyRing(file).tenants() == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"]


def test_a_destroyed_key_is_overwritten(tmp_path):
    """What the file's blocks held, seen through a descriptor that outlives its name."""
    file = tmp_path / "keys.json"
    KeyRing(file).key("a")
    with file.open("rb") as before:
        KeyRing(file).destroy("a")
        assert not before.read().strip(b"\0")


def test_processes_that_share_a_file_agree(tmp_path):
    file = tmp_path / "keys.json"
    rings = [KeyRing(file) for _ in range(4)]
    names = [f"tenant {i}" for i in range(10)]
    threads = [
        threading.Thread(target=lambda ring=ring: [ring.key(name) for name in names])
        for ring in rings
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({ring.find(name) for ring in rings for name in names}) == len(names)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_file_that_others_can_read(tmp_path, mode):
    file = tmp_path / "keys.json"
    KeyRing(file).key("a")
    file.chmod(mode)
    with pytest.raises(HeadraceError, match=f"has mode {mode:04o}: others could read.*chmod 600"):
        KeyRing(file)


def test_a_file_that_is_opened_up_later(tmp_path):
    file = tmp_path / "keys.json"
    keys = KeyRing(file)
    keys.key("a")
    file.chmod(0o644)
    with pytest.raises(HeadraceError, match="mode 0644"):
        keys.key("b")
    with (
        KVLog.open(tmp_path / "kv", b"", 4 * SEGMENT, segment_bytes=SEGMENT, keys=keys) as log,
        pytest.raises(HeadraceError, match="mode 0644"),
    ):
        log.put(0, pages([1], 100), tenant="b")


@pytest.mark.parametrize(
    "content", [b"", b"secret", b'{"version": 1}', b'{"version": 1, "keys": {"a": "YWJj"}}']
)
def test_what_is_no_file_of_keys(tmp_path, content):
    file = tmp_path / "keys.json"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(HeadraceError, match=r"keys\.json"):
        KeyRing(file)


def test_a_file_that_cannot_be(tmp_path):
    with pytest.raises(HeadraceError, match=r"is not a regular file|Is a directory"):
        KeyRing(tmp_path)
    with pytest.raises(HeadraceError, match="No such file or directory"):
        KeyRing(tmp_path / "missing" / "keys.json").key("a")


def test_a_cipher():
    cipher = SegmentCipher(b"k" * 32, b"s" * 32)
    page, head = memoryview(os.urandom(5000)), b"head"
    stored = memoryview(bytearray(5016))
    cipher.encrypt(7, page, head, stored)
    assert bytes(page[:16]) not in bytes(stored)
    plain = memoryview(bytearray(5000))
    assert cipher.decrypt(7, stored, head, plain)
    assert plain == page
    assert not cipher.decrypt(8, stored, head, plain)
    assert not cipher.decrypt(7, stored, b"read", plain)
    for key, salt in ((b"K" * 32, b"s" * 32), (b"k" * 32, b"S" * 32)):
        other = SegmentCipher(key, salt)
        assert other.check != cipher.check
        assert not other.decrypt(7, stored, head, plain)
    names = os.urandom(32)
    assert cipher.reveal(cipher.hide(names)) == names
    assert cipher.hide(names[16:]) == cipher.hide(names)[16:]


def test_no_nonce_is_used_twice(tmp_path):
    """Over segments, tenants, lost writes and reopened logs: (salt, number) never comes back."""
    keys = KeyRing(tmp_path / "keys")
    seen: set[tuple[bytes, int]] = set()
    records = 0
    for run in range(3):
        with KVLog.open(
            tmp_path / "kv", b"", 32 * SEGMENT, segment_bytes=SEGMENT, keys=keys, keep=True
        ) as log:
            for cohort, tenant in itertools.product(range(2), "ab"):
                names = [(run, cohort, tenant, i) for i in range(12)]
                log.put(cohort, pages(names, 100_000), tenant=tenant)
    for file in segments(tmp_path / "kv"):
        found = scan(file, 0)
        assert found is not None
        content = file.read_bytes()
        for entry in found.entries:
            unpacked = unpack_head(content[entry.offset :][:112])
            assert unpacked is not None
            seen.add((found.header.salt, unpacked[0].number))
            records += 1
    assert len(seen) == records == 3 * 4 * 12


def test_a_write_that_failed_uses_up_its_numbers(tmp_path, monkeypatch):
    keys = KeyRing()
    with KVLog.open(tmp_path / "kv", b"", 8 * SEGMENT, segment_bytes=SEGMENT, keys=keys) as log:
        log.put(0, pages(["a"], 300_000))
        numbers: list[int] = []
        encrypt = SegmentCipher.encrypt

        def noted(self, number, *rest):
            numbers.append(number)
            encrypt(self, number, *rest)

        def refused(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(SegmentCipher, "encrypt", noted)
        with monkeypatch.context() as full:
            full.setattr("headrace.runtime.kv_log.segment.Disk.write", refused)
            assert log.put(0, pages(["b"], 300_000)) == []
        log.put(0, pages(["b"], 300_000))
        assert get(log, key_of("b"), 300_000) == page_of(key_of("b"), 300_000)
        # The second went to a segment of its own, behind a hole nothing is added.
        assert numbers == [1, 0]
        assert len(segments(tmp_path / "kv")) == 2


def test_heads_fit():
    most = 2**63 - 1
    head = Head(b"i" * 16, b"k" * 16, most, most, most, 2**32 - 1)
    assert len(head.body()) + 24 <= 112


def test_headers_fit():
    most = 2**64 - 1
    header = SegmentHeader(
        b"i" * 16, most, most, 2**63, "\U0001f600" * 64, 1e9, b"s" * 32, b"c" * 16, True
    )
    assert len(header.pack()) == BLOCK
    assert SegmentHeader.unpack(header.pack()) == header
