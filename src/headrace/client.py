"""Clients of `headrace serve --grpc-port`."""

from headrace.cluster.client.answers import (
    Answer,
    Loads,
    ModelInfo,
    Output,
    PageCounts,
    Piece,
    ServerInfo,
    TokenLogprob,
    ToolCall,
    Usage,
)
from headrace.cluster.client.async_client import AsyncClient, AsyncStream
from headrace.cluster.client.batch_values import BatchJob, BatchPage, LineError, Result
from headrace.cluster.client.client import Client, Stream
from headrace.cluster.client.errors import (
    AbortedError,
    AuthenticationError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PreconditionError,
    RequestExistsError,
    ServerError,
    UnavailableError,
)

__all__ = [
    "AbortedError",
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationError",
    "BatchJob",
    "BatchPage",
    "Client",
    "DeadlineError",
    "InvalidRequestError",
    "LineError",
    "Loads",
    "ModelInfo",
    "NotFoundError",
    "Output",
    "OverloadedError",
    "PageCounts",
    "Piece",
    "PreconditionError",
    "RequestExistsError",
    "Result",
    "ServerError",
    "ServerInfo",
    "Stream",
    "TokenLogprob",
    "ToolCall",
    "UnavailableError",
    "Usage",
]
