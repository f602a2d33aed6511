"""A cap on host memory by a cgroup, to see what a machine with less of it would reach."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from headrace.scheduler.errors import HeadraceError

log = logging.getLogger(__name__)


def memory_cgroups(own: str, root: Path) -> tuple[Path, Path, str]:
    """The memory cgroup that /proc/self/cgroup (`own`) names, the one nearest above it that gives its children
    a limit (v2 has those that hold processes give none), and the file that says theirs."""
    places = [line.split(":", 2)[1:] for line in own.splitlines()]
    for controllers, path in places:
        if "memory" in controllers.split(","):
            home = root / "memory" / path.lstrip("/")
            return home, home, "memory.limit_in_bytes"
    unified = next(path for controllers, path in places if not controllers)
    home = root / unified.lstrip("/")
    for parent in (home, *home.parents):
        given = parent / "cgroup.subtree_control"
        if parent == root or (given.exists() and "memory" in given.read_text().split()):
            break
    return home, parent, "memory.max"


@contextmanager
def host_memory_cap(
    nbytes: int | None,
    root: Path = Path("/sys/fs/cgroup"),
    own: Path = Path("/proc/self/cgroup"),
) -> Iterator[None]:
    """Hold this process and all that it starts to `nbytes` of host memory, page cache included.

    By a cgroup inside this process's own or above it, which only root may make. Raises HeadraceError.
    """
    if nbytes is None:
        yield
        return
    home, parent, limit = memory_cgroups(own.read_text(), root)
    group = parent / f"headrace-bench-{os.getpid()}"
    try:
        home.stat()  # to which this process goes back
        group.mkdir()
        (group / limit).write_text(str(nbytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        raise HeadraceError(f"cannot cap host memory by {group}: {error}") from error
    try:
        yield
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        try:
            group.rmdir()
        except OSError as error:
            log.warning("%s is left behind (%s): a process in it has not ended", group, error)
