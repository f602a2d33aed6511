"""What the kernel and malloc say of this process's memory.

Resident memory (RSS) is anonymous memory, files that are mapped (code of libraries), and memory that processes
share. RSS counts what is shared in each process that has it; the proportional set size (PSS) counts of each
page only this process's share, so that those of all processes add up; the unique set size (USS) is what would
be free without this process.
"""

import bisect
import ctypes
import gc
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SELF = Path("/proc/self")

_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+\s*(.*)")
_SHARED = ("/dev/shm/", "/memfd:", "/dev/zero", "/SYSV", "/tmp/ray/")


@dataclass(frozen=True, slots=True)
class MappedFiles:
    """Files of one kind that are mapped: libraries of a package, or memory that processes share."""

    kind: str
    rss: int
    pss: int


@dataclass(frozen=True, slots=True)
class Malloc:
    """glibc's heap in bytes: `used` in arenas, `free` in them, and `mapped` for large blocks."""

    used: int
    free: int
    mapped: int


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes of a process. `peak` is the most RSS since `reset_peak`.

    rss = anonymous + all files' + all shared memory's. `anonymous` is what no file stands behind; `stacks` of
    its `threads` and `trimmed`, what malloc kept of memory that nobody uses and has now given back, are in it.
    """

    pid: int
    node: str
    rss: int
    pss: int
    uss: int
    swap: int
    peak: int
    anonymous: int
    files: tuple[MappedFiles, ...]
    shared: tuple[MappedFiles, ...]
    threads: int
    stacks: int
    trimmed: int
    malloc: Malloc | None


@dataclass(frozen=True, slots=True)
class Mapping:
    """A line of /proc/self/smaps and what follows it, in bytes."""

    start: int
    end: int
    path: str
    rss: int
    pss: int

    @property
    def is_anonymous(self) -> bool:
        return not self.path or self.path.startswith("[")

    @property
    def is_shared_memory(self) -> bool:
        return self.path.startswith(_SHARED)


def mappings(smaps: str) -> Iterator[Mapping]:
    """The mappings in the text of a /proc/PID/smaps."""
    header: tuple[int, int, str] | None = None
    sizes: dict[str, int] = {}
    for line in [*smaps.splitlines(), "0-0 end 0 0 0"]:
        found = _HEADER.fullmatch(line)
        if found is None:
            name, _, value = line.partition(":")
            if value.endswith("kB"):
                sizes[name] = int(value.split()[0]) * 1024
            continue
        if header is not None:
            yield Mapping(*header, sizes.get("Rss", 0), sizes.get("Pss", 0))
        header, sizes = (int(found[1], 16), int(found[2], 16), found[3]), {}


def measure_process() -> ProcessMemory:
    """This process, after what nobody uses was given back. Takes some ten milliseconds.

    Raises OSError where /proc/self/smaps cannot be read.
    """
    gc.collect()
    before = _rollup()
    trim()
    after, found = _rollup(), [*mappings((SELF / "smaps").read_text())]
    anonymous = sum(one.rss for one in found if one.is_anonymous)
    shared = [one for one in found if one.is_shared_memory]
    files = [one for one in found if not one.is_anonymous and not one.is_shared_memory]
    pointers = _stack_pointers()
    return ProcessMemory(
        pid=os.getpid(),
        node=os.uname().nodename,
        rss=sum(one.rss for one in found),
        pss=sum(one.pss for one in found),
        uss=after["Private_Clean"] + after["Private_Dirty"] + after.get("Private_Hugetlb", 0),
        swap=after["Swap"],
        peak=peak_bytes(),
        anonymous=anonymous,
        files=_by_kind(files, _package),
        shared=_by_kind(shared, _sharing),
        threads=len(os.listdir(SELF / "task")),
        stacks=_stacks(found, pointers),
        trimmed=max(0, before["Rss"] - after["Rss"]),
        malloc=malloc_state(),
    )


def _rollup() -> dict[str, int]:
    lines = (SELF / "smaps_rollup").read_text().splitlines()[1:]
    pairs = (line.split(":") for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def _by_kind(found: Iterable[Mapping], kind_of: Callable[[str], str]) -> tuple[MappedFiles, ...]:
    """Largest first."""
    rss, pss = Counter[str](), Counter[str]()
    for one in found:
        kind = kind_of(one.path)
        rss[kind] += one.rss
        pss[kind] += one.pss
    return tuple(MappedFiles(kind, nbytes, pss[kind]) for kind, nbytes in rss.most_common())


def _package(path: str) -> str:
    """The Python package that a file belongs to; others are the system's."""
    _, _, inside = path.rpartition("/site-packages/")
    if not inside or inside == path:
        return "system"
    return inside.split("/")[0].removesuffix(".libs").split(".")[0]


def _sharing(path: str) -> str:
    return "Ray's object store" if "plasma" in path or "ray" in path else "other shared memory"


def _stack_pointers() -> list[int]:
    """Of the threads that wait for something, which all but this one do."""
    found = []
    for task in (SELF / "task").iterdir():
        with suppress(OSError, ValueError, IndexError):
            found.append(int((task / "syscall").read_text().split()[-2], 16))
    return found


def _stacks(found: Iterable[Mapping], pointers: Iterable[int]) -> int:
    """Bytes of mappings that stack pointers lie in: a thread's stack has one of its own.

    Where two lie side by side with nothing between, the kernel shows them as one mapping, and both are stacks.
    """
    ordered = sorted(found, key=lambda one: one.start)
    starts = [one.start for one in ordered]
    owners = {bisect.bisect_right(starts, pointer) - 1 for pointer in pointers}
    chosen = (ordered[i] for i in owners if i >= 0)
    return sum(one.rss for one in chosen if one.is_anonymous and one.path != "[heap]")


def peak_bytes() -> int:
    """The most RSS since `reset_peak`, or ever."""
    for line in (SELF / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> bool:
    """Have `peak_bytes` begin anew; False where the kernel does not."""
    try:
        (SELF / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def trim() -> None:
    """Have malloc give back what nobody uses (glibc)."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


class _Mallinfo2(ctypes.Structure):
    """malloc.h, glibc 2.33 and later."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def malloc_state() -> Malloc | None:
    """glibc's own counts over all arenas; None of another malloc."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return None
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return Malloc(info.uordblks, info.fordblks, info.hblkhd)
