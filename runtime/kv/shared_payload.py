"""Shared memory of one machine that has no name: for a payload that outlives the process that writes it."""

import os
from typing import Self


class SharedPayload:
    """An anonymous file in memory (memfd), which grows as it is written.

    It is in no file system, only its owner may open it (below /proc, at `path`), and the kernel takes
    it back when this process closes it or ends, however it ends, and nobody else has it open.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = os.memfd_create("headrace-handover", os.MFD_CLOEXEC)
        os.fchmod(self._descriptor, 0o600)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Safe to call twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
