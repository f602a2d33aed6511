"""How a stage's process uses memory and cores, which is settled before it imports what runs."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3  # malloc.h
_MMAP_BYTES = 1 << 20


def return_large_blocks() -> None:
    """Have malloc give blocks of a MiB and more back to the system when they are freed.

    By default glibc raises that limit to 32 MiB as it sees such blocks freed, and activations of
    every size then leave holes in the heap: up to 0.26 GB beside a budget of 0.6 GB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


def wait_asleep() -> None:
    """Have threads that compute on a CPU sleep soon when they wait for each other. To be called before torch
    is imported.

    By default they spin for milliseconds: where a machine has other work, such as this run's own driver,
    on the very core that the other thread needs. docs/benchmarks.md has what that costs ("A server under
    load").
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


@contextmanager
def for_good() -> Iterator[None]:
    """What is imported and made meanwhile stays, and is never looked through for garbage.

    That would take a quarter of the time to import it, and 0.25 s of a pass whenever Python comes to it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
