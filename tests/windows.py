"""Slots on NVMe for rings of tests, over files that can be made to fail."""

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from headrace.runtime.kv.window import Blocks, NamelessFile, PageWindow
from headrace.runtime.store import Store
from headrace.scheduler.kv_format import FORMATS
from headrace.scheduler.memory import window_slot_bytes
from headrace.scheduler.placement import Plan

Wrap = Callable[[Blocks], Blocks]


@contextmanager
def windows_of(
    path: Path, plan: Plan, folder: Path, wrap: Wrap | None = None, *, encrypted: bool = True
) -> Iterator[Sequence[PageWindow | None]]:
    """The plan's slots of each stage, in files in `folder`."""
    store, fmt = Store.open(path), FORMATS[plan.kv_format]
    with ExitStack() as opened:
        windows = []
        for stage in range(plan.placement.num_stages if plan.window_pages else 0):
            layers = plan.placement.layers_of(stage)
            sizes = {i: store.layer_shapes[i].page_bytes(fmt) for i in layers}
            nbytes = plan.window_pages * window_slot_bytes(sizes.values())
            blocks: Blocks = NamelessFile(folder, nbytes)
            blocks = wrap(blocks) if wrap else blocks
            window = PageWindow(sizes, plan.window_pages, blocks, encrypted=encrypted)
            windows.append(opened.enter_context(window))
        yield windows


class Faulty:
    """Blocks of which every n-th read fails, by one of several ways in turn, or every n-th write."""

    def __init__(self, blocks: Blocks, every: int, kinds: Sequence[str]) -> None:
        self._blocks, self._every, self._kinds = blocks, every, kinds
        self._lock = threading.Lock()
        self.reads = self.writes = self.failed = 0

    def write(self, offset: int, data: memoryview) -> None:
        with self._lock:
            self.writes += 1
            fails = "write" in self._kinds and self.writes % self._every == 0
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._blocks.write(offset, data)

    def read(self, offset: int, memory: memoryview) -> int:
        with self._lock:
            self.reads += 1
            fails = self.reads % self._every == 0
            kind = self._kinds[self.failed % len(self._kinds)]
            self.failed += fails
        if fails and kind == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        count = self._blocks.read(offset, memory)
        if fails and kind == "flipped":
            memory[len(memory) // 2] ^= 4
            memory[0] ^= 1
        return count // 2 if fails and kind == "short" else count

    def close(self) -> None:
        self._blocks.close()
