"""KV pages in a file in memory, on their way from one process of a machine to another.

It is written and read, not mapped: where memory is short or something was cut off, that is an error or a
short read, and no signal.
"""

from typing import BinaryIO

import psutil

from headrace.runtime.kv.handover import Chunk, Contexts, Cut, Manifest, by_part, gathered
from headrace.scheduler.contexts import ContextIds, Taken
from headrace.scheduler.errors import HandoverError
from headrace.scheduler.sizes import format_size


def write_payload(contexts: Contexts, ids: ContextIds, path: str) -> Manifest:
    """Export `ids` to the file at `path`. HandoverError where the machine has no memory for them."""
    nbytes, available = contexts.nbytes(ids), psutil.virtual_memory().available
    if nbytes > available:
        raise HandoverError(
            f"{len(ids)} KV pages take {format_size(nbytes)} of memory beside the stage that hands them"
            f" over, and the machine has {format_size(available)} available: have the new stage start on"
            " another node, or lower --kv-host-memory or --device-memory of the run"
        )
    chunks = []
    try:
        with open(path, "r+b", buffering=0) as file:
            for cut in contexts.cuts(ids):
                chunk, payload = contexts.export(cut)
                _write(file, payload)
                chunks.append(chunk)
    except OSError as error:
        raise HandoverError(f"KV pages could not be handed over: {error.strerror}") from error
    return Manifest(contexts.identity, tuple(chunks))


def _write(file: BinaryIO, payload: memoryview) -> None:
    while payload.nbytes:
        payload = payload[file.write(payload) :]


def read_payload(
    contexts: Contexts, manifest: Manifest, path: str, targets: ContextIds | None = None
) -> Taken:
    """Import what the file at `path` has, under the same ids or, in the same order, under `targets`.

    What of the payload is damaged or missing is lost; the ids of that are those of this stage.
    HandoverError for pages that mean something else here, or of which this stage has none.
    """
    contexts.check(manifest.identity)
    own = manifest.ids if targets is None else targets
    if any(len(by_part(own)[part]) != len(ids) for part, ids in by_part(manifest.ids).items()):
        raise HandoverError(
            f"{len(manifest.ids)} KV pages are to be handed over and there are targets for {len(own)}:"
            " name one for each"
        )
    contexts.check_ids(own)
    left = {part: iter(ids) for part, ids in by_part(own).items()}
    lost, nbytes = [], 0
    try:
        with open(path, "rb", buffering=0) as file:
            for chunk in manifest.chunks:
                part = chunk.cut.part
                ids = tuple(next(left[part]) for _ in chunk.cut.ids)
                if contexts.take(chunk, _read(file, chunk), ids):
                    nbytes += chunk.nbytes
                else:
                    lost.append(Cut(part, ids))
    except OSError as error:
        raise HandoverError(f"KV pages could not be handed over: {error.strerror}") from error
    return Taken(nbytes, gathered(lost))


def _read(file: BinaryIO, chunk: Chunk) -> memoryview:
    """The next bytes, as many of the chunk's as there are."""
    payload, done = memoryview(bytearray(chunk.nbytes)), 0
    while done < chunk.nbytes and (count := file.readinto(payload[done:])):  # type: ignore[attr-defined]
        done += count
    return payload[:done]
