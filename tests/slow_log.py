"""A log of KV pages that takes as long as a test wants it to, and has as much room."""

import threading
from collections.abc import Collection, Sequence
from pathlib import Path


class SlowLog:
    """Keeps pages as files in `folder`, and no more than `room` of them.

    While `going` is cleared nothing ends; `begun` counts calls. With `broken` every call fails.
    """

    def __init__(self, folder: Path, room: int = 1000) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._room = folder, room
        self._lock = threading.Lock()
        self.going = threading.Event()
        self.going.set()
        self.broken = False
        self.begun = threading.Semaphore(0)
        self.cohorts: list[tuple[int, int]] = []

    def put(self, cohort: int, pages: Sequence[tuple[bytes, memoryview]]) -> Collection[bytes]:
        self._take_time()
        kept = []
        with self._lock:
            self.cohorts.append((cohort, len(pages)))
            for key, memory in pages:
                if len(list(self._folder.iterdir())) < self._room:
                    (self._folder / key.hex()).write_bytes(memory)
                    kept.append(key)
        return kept

    def get(self, key: bytes, dest: memoryview) -> bool:
        self._take_time()
        file = self._folder / key.hex()
        if not file.is_file():
            return False
        dest[:] = file.read_bytes()
        return True

    def _take_time(self) -> None:
        self.begun.release()
        assert self.going.wait(60.0)
        if self.broken:
            raise OSError("the drive is gone")
