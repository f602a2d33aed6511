"""Which requests run under which names, so that they can be given up from elsewhere."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from headrace.cluster.serving.async_engine import AsyncEngine
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.generation import Generation


class Call:
    """One request, from before it is read. It may be given up before it is generated."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._generation: Generation | None = None
        self._is_aborted = False

    def has(self, generation: Generation) -> None:
        self._generation = generation
        if self._is_aborted:
            self.abort()

    def abort(self) -> None:
        self._is_aborted = True
        if self._generation is not None:
            told = "the request was aborted by its request_id"
            self._engine.end(self._generation, ApiError(499, told, code="aborted"))


class Calls:
    """By key and name: nobody can give up what is another's."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._calls: dict[tuple[str, str], Call] = {}
        self._ended = asyncio.Event()
        self._ended.set()

    @contextmanager
    def running(self, tenant: str, name: str) -> Iterator[Call]:
        """ApiError 409 for a name that is taken."""
        key = tenant, name
        if key in self._calls:
            told = f"a request with the request_id {name!r} is running"
            raise ApiError(409, told, param="request_id", code="request_exists")
        self._calls[key] = made = Call(self._engine)
        self._ended.clear()
        try:
            yield made
        finally:
            del self._calls[key]
            if not self._calls:
                self._ended.set()

    async def all_ended(self) -> None:
        await self._ended.wait()

    def abort(self, tenant: str, name: str) -> bool:
        """Whether there was such a request."""
        call = self._calls.get((tenant, name))
        if call is None:
            return False
        call.abort()
        return True
