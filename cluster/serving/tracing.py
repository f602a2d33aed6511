"""A ring that serves, recorded for a while: POST /trace."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from headrace.cluster.ring_trace import RingTrace
from headrace.cluster.serving.async_engine import RETRY_SECONDS, AsyncEngine
from headrace.cluster.serving.errors import ApiError
from headrace.scheduler.errors import HeadraceError

MOST_PASSES = 4096
MOST_SECONDS = 300.0

_LOOK_SECONDS = 0.05
"""How often it is looked whether enough passes have returned: a trace keeps the newest ones."""

_AT_ONCE = 256
"""Spans that are sent together."""


class TraceRequest(BaseModel):
    """Ends when so many passes have returned, or after so many seconds, whichever is first."""

    model_config = ConfigDict(extra="forbid")

    passes: Annotated[int, Field(ge=1, le=MOST_PASSES)] = MOST_PASSES
    seconds: Annotated[float, Field(gt=0.0, le=MOST_SECONDS)] = 10.0


class Tracing:
    """Belongs to the event loop. One trace at a time."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._is_busy = False

    async def record(self, asked: TraceRequest) -> Iterator[bytes]:
        """The file, in pieces. ApiError while another one is recorded, and when the engine ends meanwhile."""
        if not self._engine.is_ready:
            raise ApiError(503, "the server takes no requests", code="not_ready")
        if self._is_busy:
            told = "the ring is being recorded for somebody: wait until that has ended"
            raise ApiError(409, told, code="trace_running", retry_after=RETRY_SECONDS)
        self._is_busy = True
        try:
            trace = await self._record(asked)
        except HeadraceError as error:
            raise ApiError(500, str(error), code="trace_failed") from error
        finally:
            self._is_busy = False
        return await asyncio.to_thread(_pieces, trace)

    async def _record(self, asked: TraceRequest) -> RingTrace:
        end = self._engine.passes + asked.passes
        await self._engine.call(lambda engine: engine.begin_trace(asked.passes))
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._until(end), asked.seconds)
        finally:
            # Also when the client has gone away: nothing is recorded for nobody.
            collect = await self._engine.call(lambda engine: engine.end_trace())
        return await asyncio.to_thread(collect)

    async def _until(self, passes: int) -> None:
        while self._engine.passes < passes and self._engine.is_ready:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._engine.failed.wait(), _LOOK_SECONDS)


def _pieces(trace: RingTrace) -> Iterator[bytes]:
    from headrace.cluster.trace_file import trace_json  # imports torch

    spans = trace_json(trace)
    return iter(lambda: b"".join(islice(spans, _AT_ONCE)), b"")
