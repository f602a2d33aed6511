"""Files with secrets, which their owner alone may read."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.scheduler.errors import HeadraceError


def check_private(file: Path, status: os.stat_result, what: str, risk: str) -> None:
    """HeadraceError unless only its owner may use the file of `what`; `risk`: what others could do, and
    what to do about it."""
    if not stat.S_ISREG(status.st_mode):
        raise HeadraceError(f"{file} is not a regular file; {what} are kept in one of mode 0600")
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise HeadraceError(f"{file} has mode {mode:04o}: {risk}")


@contextmanager
def explained(file: Path, what: str) -> Iterator[None]:
    """HeadraceError for an OSError of the block, which uses the file of `what`."""
    try:
        yield
    except OSError as error:
        raise HeadraceError(f"cannot use the {what} in {file}: {error.strerror}") from error
