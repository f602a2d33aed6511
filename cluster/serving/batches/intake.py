"""How a batch comes into the catalog. Called on the thread that owns it."""

from uuid import uuid4

from headrace.cluster.serving.batches.file_store import FileStore, Upload
from headrace.cluster.serving.batches.records import BATCH_BYTES, Batch
from headrace.cluster.serving.batches.requests import BatchOptions
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.reader import Model

WINDOW_SECONDS = 24 * 3600
MAX_OPEN = 100
"""Batches of one tenant that are unfinished."""

_INPUT_NAME = "input.jsonl"


def admit(
    store: FileStore, model: Model, owner: str, input_file_id: str, options: BatchOptions
) -> Batch:
    """ApiError for an input that is not there, and for a batch that is one too many."""
    file = store.find(owner, input_file_id)
    if file.purpose != "batch":
        raise ApiError(
            400,
            f"{file.id} was not uploaded for a batch",
            param="input_file_id",
            code="invalid_value",
        )
    if len(store.catalog.open_batches(owner)) >= MAX_OPEN:
        told = f"there are {MAX_OPEN} batches unfinished, as many as may be: try again later"
        raise ApiError(429, told, code="too_many_batches", retry_after=60)
    if not store.space.take(BATCH_BYTES):
        raise ApiError(413, "the server has no room for a batch", code="storage_full")
    wanted = options.output_expires_after
    batch = Batch(
        id=f"batch_{uuid4().hex}",
        owner=owner,
        digest=model.digest,
        model=model.name,
        endpoint=options.endpoint,
        input_file_id=file.id,
        metadata=options.metadata,
        created_at=store.now,
        expires_at=store.now + WINDOW_SECONDS,
        expires_after=store.limits.ttl if wanted is None else wanted.seconds,
    )
    store.catalog.put_batch(batch)
    return batch


def admit_upload(
    store: FileStore, model: Model, owner: str, upload: Upload, options: BatchOptions
) -> Batch:
    """Of an upload that is complete, which is kept for as long as a batch may take."""
    file = upload.finish(owner, _INPUT_NAME, "batch", min(WINDOW_SECONDS, store.limits.ttl))
    try:
        return admit(store, model, owner, file.id, options)
    except BaseException:
        store.delete(owner, file.id)
        raise
