"""Pages whose bytes follow from their keys, and what a KV log has on the drive."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

from headrace.runtime.kv_log.log import KVLog

SEGMENT = 1 << 20
CAP = 64 << 20


def key_of(name: object) -> bytes:
    return hashlib.blake2b(str(name).encode(), digest_size=16).digest()


def page_of(key: bytes, nbytes: int) -> bytes:
    return random.Random(key).randbytes(nbytes)


def pages(names, nbytes: int) -> list[tuple[bytes, memoryview]]:
    return [(key_of(name), memoryview(page_of(key_of(name), nbytes))) for name in names]


def get(log: KVLog, key: bytes, nbytes: int) -> bytes | None:
    dest = bytearray(nbytes)
    return bytes(dest) if log.get(key, memoryview(dest)) else None


def good(log: KVLog, names, nbytes: int) -> list:
    """The names whose pages come back; none of them with other bytes."""
    found = []
    for name in names:
        page = get(log, key_of(name), nbytes)
        if page is not None:
            assert page == page_of(key_of(name), nbytes), f"wrong bytes for {name}"
            found.append(name)
    return found


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("segment-*.kv"))


def on_drive(directory: Path) -> int:
    """Bytes that the directory's files take."""
    total = 0
    for entry in os.scandir(directory):
        try:
            total += entry.stat().st_blocks * 512
        except FileNotFoundError:  # deleted since it was listed
            continue
    return total


def script(body: str, *arguments: object) -> list[str]:
    """A command that runs Python code with what tests import."""
    return [sys.executable, "-c", body, *map(str, arguments)]


def environment() -> dict[str, str]:
    root = Path(__file__).parents[1]
    return {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root / 'tests'}"}


def run(body: str, *arguments: object) -> str:
    done = subprocess.run(
        script(body, *arguments),
        check=False,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
