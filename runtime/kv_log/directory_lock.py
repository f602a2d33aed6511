"""One process at a time in a directory."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

from headrace.scheduler.errors import KVLogError

LOCK_NAME = "headrace-kv.lock"


class DirectoryLock:
    """Held from the start until close() or the end of the process, however that comes.

    Raises KVLogError while another process holds it, and OSError where no file can be made.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / LOCK_NAME
        self._descriptor: int | None = None
        while self._descriptor is None:
            self._descriptor = self._try()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def _try(self) -> int | None:
        """A locked descriptor; None if the file was deleted by its last holder meanwhile."""
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(self._file).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise KVLogError(
                f"{self._file.parent} is in use by process {holder or 'unknown'}; wait for it to end,"
                " or choose another directory"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def close(self) -> None:
        """Leaves no file. May be called again."""
        if self._descriptor is not None:
            with suppress(FileNotFoundError):
                self._file.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_held(directory: Path) -> bool:
    """Whether a process holds the directory now. Creates nothing; OSError where it may not look."""
    try:
        descriptor = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
