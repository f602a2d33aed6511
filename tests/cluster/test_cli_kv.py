import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from kv_logs import CAP, SEGMENT, environment, pages, script, segments

from headrace.cluster.cli.main import main
from headrace.runtime.kv_log.keys import KeyRing
from headrace.runtime.kv_log.log import KVLog

NBYTES = 100_000


def fill(directory: Path, keys: KeyRing | None = None, **options) -> None:
    with KVLog.open(
        directory, b"id", CAP, segment_bytes=SEGMENT, keys=keys, keep=True, **options
    ) as log:
        log.put(0, pages(range(12), NBYTES), tenant="alice")
        log.put(1, pages("xyz", NBYTES), tenant="[bold] bob")


@pytest.fixture
def plain(tmp_path):
    fill(tmp_path / "kv")
    return tmp_path / "kv"


@pytest.fixture
def encrypted(tmp_path):
    fill(tmp_path / "kv", KeyRing(tmp_path / "keys"))
    return tmp_path / "kv"


@pytest.fixture
def headrace(capsys, monkeypatch):
    """Runs the command line in this process: (exit code, output, errors)."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["kv", *map(str, arguments)])
        output, errors = capsys.readouterr()
        return int(ended.value.code or 0), output, errors

    return run


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_ls(plain, headrace):
    code, output, errors = headrace("ls", plain)
    assert (code, errors) == (0, "")
    rows = [line.split("│") for line in output.splitlines() if "sealed" in line]
    assert [[cell.strip() for cell in row[1:5]] for row in rows] == [
        ["0", "alice", "0", "10"],
        ["1", "alice", "0", "2"],
        ["2", "[bold] bob", "1", "3"],
    ]
    assert "15 pages, 1.43 MiB" in output
    assert re.search(r"files +3 segments, 1\.\d+ MiB, 1\.0\d\d bytes a byte of page", output)
    assert "2 tenants, 2 cohorts" in output
    assert "drive" in output
    assert "in use" not in output


def test_ls_for_machines(encrypted, headrace):
    code, output, _ = headrace("ls", encrypted, "--json")
    listed = json.loads(output)
    assert code == 0
    assert listed["in_use"] is False
    assert [segment["pages"] for segment in listed["segments"]] == [10, 2, 3]
    assert {segment["encrypted"] for segment in listed["segments"]} == {"yes"}
    assert sum(segment["page_bytes"] for segment in listed["segments"]) == 15 * NBYTES
    assert listed["unreadable"] == []


def test_ls_of_an_empty_directory(tmp_path, headrace):
    code, output, _ = headrace("ls", tmp_path)
    assert code == 0
    assert re.search(r"pages +none", output)


def test_ls_shows_what_was_written(tmp_path, headrace):
    fill(tmp_path, daily_writes=10**9)
    assert "since there is a daily budget" in headrace("ls", tmp_path)[1]


@pytest.mark.parametrize("command", ["ls", "verify", "purge"])
def test_a_directory_that_is_not_there(tmp_path, headrace, command):
    code, _, errors = headrace(command, tmp_path / "nope")
    assert code == 1
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert "nope is not a directory" in errors


def test_verify(plain, headrace):
    code, output, _ = headrace("verify", plain)
    assert (code, output) == (0, "15 pages in 3 segments are good\n")


def test_verify_with_and_without_the_key(encrypted, headrace):
    code, output, _ = headrace("verify", encrypted)
    assert code == 0
    assert "15 of them by their checksums alone, without their key" in output
    code, output, _ = headrace("verify", encrypted, "--key-file", encrypted.parent / "keys")
    assert (code, output) == (0, "15 pages in 3 segments are good\n")


def test_verify_finds_damage(encrypted, headrace):
    first, second, third = segments(encrypted)
    flip(first, 300_000)
    flip(second, 30)
    (encrypted / "segment-00000077.kv").write_text("not ours")
    code, output, _ = headrace("verify", encrypted)
    assert code == 1
    assert re.search(r"segment-00000000\.kv │ alice +│ +10 │ 1 damaged", output)
    assert "segment-00000001.kv has a damaged header" in output
    assert "segment-00000077.kv has the name of a segment of KV pages, but is none" in output
    assert "1 page cannot be read" in " ".join(output.split())
    code, output, _ = headrace("verify", encrypted, "--json")
    found = json.loads(output)
    assert code == 1
    assert found["good"] is False
    assert [segment["bad"] for segment in found["segments"]] == [{"damaged": 1}, {}]
    assert third.exists()


def test_verify_does_not_fail_for_what_is_not_ours(plain, headrace):
    (plain / "segment-00000077.kv").write_text("not ours")
    assert headrace("verify", plain)[0] == 0


def test_verify_of_a_truncated_segment(plain, headrace):
    """Without its footer a segment is walked; what is cut off is not known to have been there."""
    file = segments(plain)[0]
    os.truncate(file, 300_000)
    code, output, _ = headrace("verify", plain)
    assert code == 0
    assert "7 pages in 3 segments are good; 1 segment was cut off" in output
    assert "cut off" in headrace("ls", plain)[1]


def test_purge_of_a_tenant(encrypted, headrace):
    keys = encrypted.parent / "keys"
    code, output, _ = headrace("purge", encrypted, "--job", "alice", "--yes", "--key-file", keys)
    assert code == 0
    assert re.search(r"what +tenant alice", output)
    assert re.search(r"pages +12 pages, 1\.14 MiB", output)
    assert re.search(r"key +destroyed", output)
    assert len(re.findall(r"[0-9a-f]{64}", output)) == 1
    assert KeyRing(keys).tenants() == ["[bold] bob"]
    assert len(segments(encrypted)) == 1
    assert "3 pages in 1 segment are good" in headrace("verify", encrypted, "--key-file", keys)[1]


def test_purge_without_the_keys_says_so(encrypted, headrace):
    code, output, _ = headrace("purge", encrypted, "--yes", "--json")
    receipt = json.loads(output)
    assert code == 0
    assert receipt["pages"] == 15
    assert receipt["segments"] == 3
    assert receipt["tenants"] == ["[bold] bob", "alice"]
    assert receipt["encrypted"] is True
    assert receipt["key_destroyed"] is False
    assert [*encrypted.iterdir()] == []


def test_purge_leaves_what_is_not_ours(plain, headrace):
    (plain / "segment-00000077.kv").write_text("not ours")
    (plain / "notes").write_text("mine")
    flip(segments(plain)[0], 30)
    code, output, _ = headrace("purge", plain, "--yes")
    assert code == 0
    assert "3 segments" in output
    assert sorted(file.name for file in plain.iterdir()) == ["notes", "segment-00000077.kv"]


def test_purge_asks(plain, headrace):
    code, _, errors = headrace("purge", plain, "--tenant", "alice")
    assert code == 1
    assert f"this deletes the pages of 'alice' in {plain}: 12 pages" in errors
    assert "Add --yes" in errors
    assert len(segments(plain)) == 3


def test_purge_of_a_misspelt_tenant(plain, headrace):
    code, _, errors = headrace("purge", plain, "--tenant", "alcie", "--yes")
    assert code == 1
    assert "no pages of 'alcie'; there are pages of [bold] bob, alice" in errors
    assert len(segments(plain)) == 3


@pytest.mark.parametrize("command", ["verify", "purge"])
def test_keys_that_cannot_be_used(plain, headrace, command):
    file = plain.parent / "secret"
    code, _, errors = headrace(command, plain, "--key-file", file)
    assert code == 1
    assert "secret is not there" in errors
    KeyRing(file).key("a")
    file.chmod(0o644)
    code, _, errors = headrace(command, plain, "--key-file", file)
    assert code == 1
    assert "mode 0644" in errors
    assert "Traceback" not in errors
    assert len(segments(plain)) == 3


HOLD = """
import sys
from pathlib import Path
from kv_logs import pages
from headrace.runtime.kv_log.log import KVLog
with KVLog.open(Path(sys.argv[1]), b"id", 64 << 20, segment_bytes=1 << 20) as log:
    log.put(0, pages("pqr", 100_000), tenant="carol")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_log_in_use(plain, headrace):
    with subprocess.Popen(
        script(HOLD, plain),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        code, _, errors = headrace("purge", plain, "--yes")
        assert code == 1
        assert "is in use by a process that runs: stop it first" in errors
        code, output, _ = headrace("ls", plain)
        assert code == 0
        assert "in use" in output
        assert re.search(r"carol .* written to", output)
        code, output, _ = headrace("verify", plain)
        assert code == 0
        assert "1 segment that a process writes to left out" in output
        process.communicate()
    assert process.returncode == 0
    assert headrace("purge", plain, "--yes")[0] == 0
