"""Threads that turn requests into tokens, and how much of what clients send there is at once."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from headrace.cluster.serving.errors import ApiError

SHORT = 64 << 10
"""Bytes of a request that is tokenized in a few milliseconds."""

_SHORT_THREADS = 4
_LONG_THREADS = 2
"""Each tokenizes more in a second than most models compute of prompts."""

_RETRY_SECONDS = 2

T = TypeVar("T")


class ReadingRoom:
    """Does the work that comes before a request can run, on threads of its own: short ones never wait for
    long ones. Everything else is called on one event loop.

    All requests that are no longer short have `max_bytes` together, from when they come in until they are
    tokens.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._short = ThreadPoolExecutor(_SHORT_THREADS, "short-requests")
        self._long = ThreadPoolExecutor(_LONG_THREADS, "long-requests")

    @contextmanager
    def holding(self) -> Iterator["Held"]:
        """Room for one request, as far as it is told of."""
        held = Held(self)
        try:
            yield held
        finally:
            self.num_bytes -= held.num_bytes

    def take(self, count: int) -> bool:
        """Whether there is room for so many bytes more, which are then taken."""
        if self.num_bytes + count > self.max_bytes:
            return False
        self.num_bytes += count
        return True

    async def run(self, num_bytes: int, work: Callable[[], T]) -> T:
        """Do the work for a request of so many bytes."""
        threads = self._short if num_bytes <= SHORT else self._long
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    def close(self) -> None:
        """Begin nothing more. Safe to call twice."""
        for threads in (self._short, self._long):
            threads.shutdown(wait=False, cancel_futures=True)


class Held:
    """What one request has of that room."""

    def __init__(self, room: ReadingRoom) -> None:
        self._room, self.num_bytes = room, 0

    def grow(self, num_bytes: int) -> bool:
        """Whether there is room for it to have so many bytes."""
        if num_bytes <= SHORT:
            return True
        has_room = self._room.take(num_bytes - self.num_bytes)
        self.num_bytes = num_bytes if has_room else self.num_bytes
        return has_room

    def refusal(self) -> ApiError:
        """What a client is told when there is none."""
        room = self._room
        return ApiError(
            429,
            f"long requests of {room.num_bytes} bytes are being read, of at most"
            f" {room.max_bytes} at once: try again later",
            code="too_many_bytes",
            retry_after=_RETRY_SECONDS,
        )
