"""The service: requests as over HTTP, through the same reader to the same engine."""

from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import Any
from uuid import uuid4

from headrace import __version__
from headrace.cluster.serving.async_engine import AsyncEngine
from headrace.cluster.serving.choices import Answer, Piece
from headrace.cluster.serving.guard import Caller, Gate
from headrace.cluster.serving.reader import Model, Reader, Work
from headrace.cluster.serving.reading_room import ReadingRoom
from headrace.cluster.serving.rpc import inference_pb2 as pb
from headrace.cluster.serving.rpc.answers import loads_message, piece_message
from headrace.cluster.serving.rpc.calls import Calls
from headrace.cluster.serving.rpc.door import Door
from headrace.cluster.serving.rpc.inference_pb2_grpc import InferenceServicer
from headrace.cluster.serving.rpc.requests import read_request

NAME: str = pb.DESCRIPTOR.services_by_name["Inference"].full_name


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients are told of a server's: sequences of a key and class that wait, bytes of a request."""

    max_waiting: int
    max_body: int


class Inference(InferenceServicer):
    """Counts requests of keys together with those over HTTP: both have one gate."""

    def __init__(
        self,
        engine: AsyncEngine,
        reader: Reader,
        room: ReadingRoom,
        model: Model,
        gate: Gate,
        door: Door,
        calls: Calls,
        limits: Limits,
    ) -> None:
        self._engine, self._reader, self._room = engine, reader, room
        self._model, self._gate, self._door, self._limits = model, gate, door, limits
        self._calls, self._since = calls, monotonic()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        async with self._door.call(context, f"{NAME}/Generate", request):
            with self._gate.running(self._door.key(context), is_rated=True) as caller:
                await self._generate(request, context, caller)

    async def _generate(self, request: pb.GenerateRequest, context: Any, caller: Caller) -> None:
        since, left = self._engine.now(), context.time_remaining()
        name = request.request_id or uuid4().hex
        with self._calls.running(caller.tenant, name) as call:
            work = await self._read(request, caller.tenant)
            terms = work.terms.of_key(caller.weight).within(left)
            work = replace(work, terms=terms)
            answer = Answer(work, self._model, 0)
            with self._engine.running(work.orders, terms, since) as generation:
                call.has(generation)
                async for piece in answer.pieces(generation):
                    message = self._message(work, answer, piece)
                    await context.write(pb.GenerateResponse(request_id=name, piece=message))
            usage = pb.Usage(**answer.usage())
            await context.write(pb.GenerateResponse(request_id=name, usage=usage))

    async def _read(self, request: pb.GenerateRequest, tenant: str) -> Work:
        num_bytes = request.ByteSize()
        with self._room.holding() as held:
            if not held.grow(num_bytes):
                raise held.refusal()
            read = partial(read_request, self._reader, request, tenant)
            return await self._room.run(num_bytes, read)

    def _message(self, work: Work, answer: Answer, piece: Piece) -> pb.Piece:
        logprobs = work.orders[piece.index].params.logprobs is not None
        reason = answer.finish_reason(piece)
        return piece_message(piece, reason, self._model.tokenizer, logprobs=logprobs)

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        async with self._door.call(context, f"{NAME}/Abort", request):
            # Not counted: a key with as many requests as it may have can still give one up.
            key = self._door.key(context)
            tenant = "" if key is None else key.name
            return pb.AbortResponse(was_running=self._calls.abort(tenant, request.request_id))

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.ModelInfo:
        async with self._door.call(context, f"{NAME}/GetModelInfo", request):
            model = self._model
            return pb.ModelInfo(
                name=model.name,
                digest=model.digest,
                max_model_len=model.max_context,
                vocabulary_size=len(model.tokenizer),
                has_chat_template=model.tokenizer.chat_template is not None,
                adapters=[
                    pb.AdapterInfo(name=name, base=model.name, digest=digest)
                    for name, digest in self._reader.adapters.items()
                ],
            )

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.ServerInfo:
        async with self._door.call(context, f"{NAME}/GetServerInfo", request):
            return pb.ServerInfo(
                version=__version__,
                is_ready=self._engine.is_ready,
                uptime_seconds=monotonic() - self._since,
                max_waiting=self._limits.max_waiting,
                max_body=self._limits.max_body,
            )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Any) -> pb.Loads:
        async with self._door.call(context, f"{NAME}/GetLoads", request):
            return loads_message(self._engine.state, self._engine.num_open)
