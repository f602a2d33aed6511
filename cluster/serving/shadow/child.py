"""The shadow's process as its server sees it, on the event loop."""

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress

from headrace.cluster.serving.shadow.messages import LENGTH_BYTES, Order, Report, Setup, framed
from headrace.cluster.wire import decode

WORKER = "headrace.cluster.serving.shadow.worker"

COMMAND = ("nice", "-n", "19", sys.executable, "-P", "-m", WORKER)
"""Gives way from the start: to import torch takes seconds of a processor."""


class ChildDiedError(Exception):
    """The process has ended, for whatever reason; its own words are on standard error."""


class Child:
    """One process. Its memory is not the server's, and neither is its end."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, setup: Setup) -> "Child":
        """ChildDiedError when the machine has no room for another process."""
        try:
            # In a session of its own, which a terminal's Ctrl-C does not reach: it ends when the server does.
            process = await asyncio.create_subprocess_exec(
                *COMMAND, stdin=PIPE, stdout=PIPE, start_new_session=True
            )
        except OSError as error:
            raise ChildDiedError(f"it cannot be started: {error.strerror}") from error
        child = cls(process)
        child._send(framed(setup))
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, order: Order) -> None:
        self._send(framed(order))

    async def report(self) -> Report:
        """What it makes of the batch that it was told of. ChildDiedError when it makes nothing."""
        assert self._process.stdout is not None
        read = self._process.stdout.readexactly
        try:
            length = int.from_bytes(await read(LENGTH_BYTES), "big")
            return decode(await read(length), Report)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ChildDiedError(f"process {self.pid} ended") from error

    def _send(self, data: bytes) -> None:
        """A process that has died is noticed where its report is awaited."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(data)

    async def close(self) -> None:
        """It holds nothing that has an end of its own. Safe to call twice."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
