"""Batches as plain values, and their rows as messages."""

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from headrace.cluster.serving.rpc import batch_pb2 as pb
from headrace.scheduler.errors import RequestError

Row = Mapping[str, Any] | str | bytes
"""A line of OpenAI's batch files, {"custom_id", "method": "POST", "url", "body"}, or its JSON."""

_PACK = 4000
"""Characters of lines in a message, or one line: few, for a server may let messages have few bytes."""

_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})


@dataclass(frozen=True, slots=True)
class LineError:
    """What is wrong with a line of an input, from 1, or without one with the whole."""

    code: str
    message: str
    line: int | None
    param: str | None


@dataclass(frozen=True, slots=True)
class BatchJob:
    """`status` is OpenAI's; of its lines `total` are there, and `completed` and `failed` have ended. `times`, in
    Unix seconds, say when it was created, when it expires and when it came into which status."""

    id: str
    status: str
    endpoint: str
    model: str
    metadata: dict[str, str]
    total: int
    completed: int
    failed: int
    errors: list[LineError]
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    times: dict[str, int]

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED


@dataclass(frozen=True, slots=True)
class BatchPage:
    """The newest first; the next page comes `after` the last id, if it `has_more`."""

    batches: list[BatchJob]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Result:
    """One line of results as the server has it, and the offset from which to go on behind it."""

    line: str
    next_offset: int

    @property
    def data(self) -> dict[str, Any]:
        """{"id", "custom_id", "response", "error"}"""
        found: dict[str, Any] = json.loads(self.line)
        return found


class Sending(Iterator[pb.SubmitRequest]):
    """The messages of a submission, whichever thread they are taken by. A row that cannot be sent cancels the
    call and is the `error`: gRPC would log it, or take the end of the messages for that of the rows."""

    def __init__(
        self,
        rows: Iterable[Row],
        endpoint: str,
        metadata: Mapping[str, str] | None,
        output_expires_after: int | None,
    ) -> None:
        try:
            options = pb.BatchOptions(
                endpoint=endpoint, metadata=metadata, output_expires_after=output_expires_after
            )
        except (TypeError, ValueError) as error:
            raise RequestError(f"a batch: {error}") from error
        self._messages = chain([pb.SubmitRequest(options=options)], _packed(rows))
        self._call: Any = None
        self._is_bound = threading.Event()
        self.error: Exception | None = None

    def bind(self, call: Any) -> None:
        self._call = call
        self._is_bound.set()

    def __next__(self) -> pb.SubmitRequest:
        try:
            return next(self._messages)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            self._is_bound.wait()
            self._call.cancel()
            raise StopIteration from error


def _packed(rows: Iterable[Row]) -> Iterator[pb.SubmitRequest]:
    """RequestError for a row that is no line."""
    lines: list[str] = []
    size = 0
    for number, row in enumerate(rows, 1):
        line = _line(number, row)
        if lines and size + len(line) > _PACK:
            yield pb.SubmitRequest(lines=lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield pb.SubmitRequest(lines=lines)


def _line(number: int, row: Row) -> str:
    try:
        if isinstance(row, Mapping):
            return json.dumps(dict(row))
        return (row.decode() if isinstance(row, bytes) else row).rstrip("\r\n")
    except (TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"row {number}: {error}") from error


def batch_job(message: pb.BatchJob) -> BatchJob:
    times = {
        field.name: value for field, value in message.ListFields() if field.name.endswith("_at")
    }
    return BatchJob(
        id=message.id,
        status=pb.BatchStatus.Name(message.status).removeprefix("BATCH_STATUS_").lower(),
        endpoint=message.endpoint,
        model=message.model,
        metadata=dict(message.metadata),
        total=message.counts.total,
        completed=message.counts.completed,
        failed=message.counts.failed,
        errors=[
            LineError(
                each.code,
                each.message,
                each.line if each.HasField("line") else None,
                each.param if each.HasField("param") else None,
            )
            for each in message.errors
        ],
        input_file_id=message.input_file_id,
        output_file_id=message.output_file_id or None,
        error_file_id=message.error_file_id or None,
        times=times,
    )


def batch_page(message: pb.ListBatchesResponse) -> BatchPage:
    return BatchPage([batch_job(each) for each in message.batches], message.has_more)


def results_of(message: pb.ResultsResponse) -> list[Result]:
    return [Result(each.line, each.next_offset) for each in message.results]
