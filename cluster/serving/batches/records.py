"""What is known of files and batches: kept in the catalog, and shown to clients in OpenAI's shapes."""

from enum import Enum
from typing import Any

import msgspec

FILE_BYTES = 4096
"""What a file takes at least, so that empty ones have a cap, too."""

BATCH_BYTES = 64 << 10
"""What the record of a batch takes at most."""


class Status(Enum):
    """Of a batch. It goes on only as NEXT says."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def has_ended(self) -> bool:
        return self not in NEXT


NEXT = {
    Status.VALIDATING: {Status.IN_PROGRESS, Status.FAILED, Status.CANCELLED, Status.EXPIRED},
    Status.IN_PROGRESS: {Status.FINALIZING, Status.CANCELLING, Status.FAILED},
    Status.CANCELLING: {Status.CANCELLED, Status.FAILED},
    Status.FINALIZING: {Status.COMPLETED, Status.EXPIRED, Status.FAILED},
}


_MOMENTS = [f"{status.value}_at" for status in Status if status is not Status.VALIDATING]


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file; times in Unix seconds. `origin` is where a batch's results lay before they were files."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int
    origin: str | None = None

    @property
    def space(self) -> int:
        return max(self.bytes, FILE_BYTES)

    @property
    def shown(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch failed; `line` is of its input, from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One batch. `digest` is the model's, `times` when it came into which status (`failed_at`, ...),
    `expires_after` how many seconds its results are kept, `reserve` is of BatchSpace, and `removed_at` when
    the record of an ended one goes."""

    id: str
    owner: str
    digest: str
    model: str
    endpoint: str
    input_file_id: str
    metadata: dict[str, str] | None
    created_at: int
    expires_at: int
    expires_after: int
    status: Status = Status.VALIDATING
    times: dict[str, int] = {}
    errors: list[Fault] = []
    total: int = 0
    completed: int = 0
    failed: int = 0
    reserve: int = 0
    has_expired: bool = False
    output_file_id: str | None = None
    error_file_id: str | None = None
    removed_at: int | None = None

    def to(self, status: Status, now: int, **changes: Any) -> "Batch":
        """The batch in its next status."""
        assert status in NEXT[self.status], (self.status, status)
        times = {**self.times, f"{status.value}_at": now}
        return msgspec.structs.replace(self, status=status, times=times, **changes)

    @property
    def shown(self) -> dict[str, Any]:
        errors = [msgspec.to_builtins(fault) for fault in self.errors]
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status.value,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **{moment: self.times.get(moment) for moment in _MOMENTS},
            "request_counts": {
                "total": self.total,
                "completed": self.completed,
                "failed": self.failed,
            },
            "metadata": self.metadata,
        }
