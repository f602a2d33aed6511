"""Lines of a batch: what the routes would make of each, and what is written of it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from headrace.cluster.answers import encode
from headrace.cluster.rows import Draft, Kind, decode
from headrace.cluster.seeds import derive_seed, own_identity
from headrace.cluster.serving.batches.space import BatchSpace
from headrace.cluster.serving.batches.validate import LINE_SPACE
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.http import api_error
from headrace.cluster.serving.reader import Reader, Work
from headrace.scheduler.errors import RequestError


class LineError(RequestError):
    """What a line ends with: an error that its request got, or (without a status) why it got none."""

    def __init__(self, message: str, code: str | None, *, status: int | None = None) -> None:
        super().__init__(message)
        self.code, self.status = code, status
        self.body: dict[str, Any] | None = None

    @classmethod
    def of(cls, error: ApiError) -> "LineError":
        made = cls(error.message, error.code, status=error.status)
        made.body = error.body
        return made


def expired() -> LineError:
    told = "This request could not be executed before the completion window expired."
    return LineError(told, "batch_expired")


def cancelled() -> LineError:
    return LineError("This batch was cancelled before the request was executed.", "batch_cancelled")


def storage_full() -> LineError:
    return LineError("The server has no room for this line's answer.", "storage_full")


class BatchLines:
    """Reads lines as the route of a batch does. With a `verdict` every line ends with one of its errors."""

    def __init__(
        self,
        kind: Kind,
        owner: str,
        digest: str,
        reader: Reader,
        space: BatchSpace,
        verdict: Callable[[], LineError] | None = None,
    ) -> None:
        self._kind, self._owner, self._digest, self._reader = kind, owner, digest, reader
        self._space, self._verdict = space, verdict
        self._salt = f"{digest}\n{kind.value}".encode()

    def decode(self, number: int, raw: bytes | Mapping[str, Any]) -> Draft:
        return decode(number, raw, self._salt)

    def prepare(self, draft: Draft) -> Work:
        if self._verdict is not None:
            raise self._verdict()
        if self._space.is_full:
            raise storage_full()
        read = self._reader.chat if self._kind is Kind.CHAT else self._reader.completion
        try:
            work = read(json.dumps(draft.data["body"]).encode(), self._owner)
            if work.streams:
                raise RequestError("a line of a batch has no stream to answer with", "stream")
        except (ApiError, RequestError, ValidationError) as error:
            raise LineError.of(api_error(error)) from error
        return self._named(draft, work)

    def answer(self, draft: Draft, body: dict[str, Any]) -> bytes:
        """LineError where there is no room for it."""
        line = encode(_line(draft, {**_response(draft), "status_code": 200, "body": body}, None))
        if not self._space.take(len(line)):
            raise storage_full()
        return line

    def refusal(
        self, number: int, raw: bytes | Mapping[str, Any], draft: Draft | None, error: RequestError
    ) -> bytes:
        assert draft is not None, f"line {number} was checked before"
        if not isinstance(error, LineError):
            error = LineError.of(api_error(error))
        line = _refused(draft, error)
        beyond = len(line) - LINE_SPACE - len(encode({"custom_id": draft.id}))
        if beyond > 0 and not self._space.take(beyond):
            return _refused(draft, storage_full())
        return line

    def _named(self, draft: Draft, work: Work) -> Work:
        """With seeds and a name that are the same whenever it runs: without seeds of its own, a line is
        drawn as the row of a batch job with its id."""
        orders = [
            order
            if order.params.seed is not None
            else replace(order, seed=self._seed(draft, *divmod(place, work.n)))
            for place, order in enumerate(work.orders)
        ]
        return replace(work, name=_name(draft), orders=orders)

    def _seed(self, draft: Draft, prompt: int, index: int) -> int:
        own = own_identity(draft.id)
        return derive_seed(self._digest, f"{own} {prompt}" if prompt else own, index)


def _name(draft: Draft) -> str:
    return f"{draft.key:016x}"


def _line(
    draft: Draft, response: dict[str, Any] | None, error: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{_name(draft)}",
        "custom_id": draft.id,
        "response": response,
        "error": error,
    }


def _response(draft: Draft) -> dict[str, Any]:
    return {"status_code": 0, "request_id": f"req_{_name(draft)}"}


def _refused(draft: Draft, error: LineError) -> bytes:
    if error.body is None:
        return encode(_line(draft, None, {"code": error.code, "message": str(error)}))
    response = {**_response(draft), "status_code": error.status, "body": error.body}
    return encode(_line(draft, response, None))
