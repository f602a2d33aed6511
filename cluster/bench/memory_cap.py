"""A cap on host memory by a cgroup, to see what a machine with less of it would reach."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from headrace.scheduler.errors import HeadraceError

log = logging.getLogger(__name__)


def memory_cgroup(own: str, root: Path) -> tuple[Path, str]:
    """The memory cgroup that /proc/self/cgroup (`own`) names, and the file that holds its limit."""
    places = [line.split(":", 2)[1:] for line in own.splitlines()]
    for controllers, path in places:
        if "memory" in controllers.split(","):
            return root / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
    unified = next(path for controllers, path in places if not controllers)
    return root / unified.lstrip("/"), "memory.max"


@contextmanager
def host_memory_cap(
    nbytes: int | None,
    root: Path = Path("/sys/fs/cgroup"),
    own: Path = Path("/proc/self/cgroup"),
) -> Iterator[None]:
    """Hold this process and all that it starts to `nbytes` of host memory, page cache included.

    By a cgroup inside this process's own, which only root may make. Raises HeadraceError.
    """
    if nbytes is None:
        yield
        return
    parent, limit = memory_cgroup(own.read_text(), root)
    group = parent / f"headrace-bench-{os.getpid()}"
    try:
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
        (parent / "cgroup.procs").write_text(str(os.getpid()))
        try:
            group.rmdir()
        except OSError as error:
            log.warning("%s is left behind (%s): a process in it has not ended", group, error)
