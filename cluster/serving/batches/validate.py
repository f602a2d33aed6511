"""What is checked of a batch's input before any of it runs: the shape of every line."""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from headrace.cluster.answers import encode
from headrace.cluster.id_set import IdSet
from headrace.cluster.row_models import Envelope, reasons
from headrace.cluster.rows import load_object
from headrace.cluster.serving.batches.records import Fault
from headrace.scheduler.errors import RequestError

MAX_LINES = 1_000_000
MAX_ERRORS = 50
_SHOWN = 300

LINE_SPACE = 400
"""More bytes than a line with a short error takes besides its id, and than its record in the journal."""

_BREATH_LINES, _BREATH_SECONDS = 64, 0.0005


@dataclass(slots=True)
class Checked:
    """What was found: lines, the space that they need to end in short errors, and what is wrong."""

    total: int = 0
    reserve: int = 0
    errors: list[Fault] = field(default_factory=list)
    was_stopped: bool = False


def check_lines(
    path: Path,
    endpoint: str,
    models: Collection[str],
    max_line: int,
    is_stopped: Callable[[], bool],
) -> Checked:
    """Read all lines of a file; `max_line` is in bytes. Parameters of bodies are each line's own matter."""
    found, ids = Checked(), IdSet()
    for number, line in _lines(path, max_line):
        if is_stopped():
            found.was_stopped = True
            break
        if number % _BREATH_LINES == 0:
            time.sleep(_BREATH_SECONDS)  # the interpreter is the engine's, too
        if line is not None and line.isspace():
            continue
        found.total += 1
        fault = _too_long(number, max_line) if line is None else None
        if line is not None:
            fault = _check(number, line, endpoint, models, ids, found)
        if found.total > MAX_LINES:
            told = f"a batch may have {MAX_LINES} lines: send several"
            found.errors = [Fault(code="too_many_lines", message=told)]
            break
        if fault is not None:
            found.errors.append(fault)
            if len(found.errors) == MAX_ERRORS:
                break
    if not found.total and not found.was_stopped:
        found.errors.append(Fault(code="empty_file", message="the input has no lines"))
    return found


def _lines(path: Path, max_line: int) -> Iterator[tuple[int, bytes | None]]:
    """Lines by their numbers, from 1; None for one that is too long, which is not kept."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(max_line + 1):
            number += 1
            if len(line) <= max_line:
                yield number, line
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(1 << 20)
            yield number, None


def _check(
    number: int, line: bytes, endpoint: str, models: Collection[str], ids: IdSet, found: Checked
) -> Fault | None:
    try:
        data = load_object(line, "a line")
    except RequestError as error:
        return Fault(code="invalid_json_line", message=str(error)[:_SHOWN], line=number)
    try:
        envelope = Envelope.model_validate(data)
    except ValidationError as error:
        where = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = str(where["loc"][0])[:64] if where["loc"] else None
        return _fault("invalid_line", reasons(error), number, param)
    found.reserve += LINE_SPACE + len(encode({"custom_id": envelope.custom_id}))
    if envelope.url != endpoint:
        told = f"the url is {envelope.url}, and the batch is for {endpoint}"
        return _fault("mismatched_url", told, number, "url")
    if not ids.add(envelope.custom_id):
        told = f"the custom_id {envelope.custom_id[:80]!r} is an earlier line's"
        return _fault("duplicate_custom_id", told, number, "custom_id")
    return _check_model(number, envelope.body.get("model"), models)


def _check_model(number: int, given: Any, models: Collection[str]) -> Fault | None:
    if given is None or given in models:
        return None
    told = f"there is no model {str(given)[:80]!r} here; this server has {', '.join(map(repr, models))}"
    return _fault("model_not_found", told, number, "body.model")


def _fault(code: str, message: str, line: int, param: str | None) -> Fault:
    return Fault(code=code, message=message[:_SHOWN], line=line, param=param)


def _too_long(number: int, max_line: int) -> Fault:
    told = f"the line has more than {max_line} bytes"
    return Fault(code="line_too_long", message=told, line=number)
