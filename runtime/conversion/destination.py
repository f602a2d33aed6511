"""The directory that a store comes to be in: whose it is, whether it is finished, and what is held back."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace.runtime.block_file import sync_directory
from headrace.runtime.conversion.encoder import STATES
from headrace.runtime.manifest import MANIFEST
from headrace.runtime.store import HELD, JOURNAL, Store
from headrace.scheduler.errors import StoreError


@contextmanager
def locked(dest: Path) -> Iterator[None]:
    """Creates the directory and keeps other conversions out of it."""
    try:
        dest.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(dest, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StoreError(f"cannot write a store to {dest}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise StoreError(f"another conversion is writing to {dest}; wait until it ends") from error
    finally:
        os.close(descriptor)


def hold_back(dest: Path) -> None:
    """From now on a finished store is none, though nothing of it is lost; it survives a power cut."""
    (dest / MANIFEST).replace(dest / HELD)
    sync_directory(dest)


def release(dest: Path) -> None:
    """Makes what was held back a store again."""
    (dest / HELD).replace(dest / MANIFEST)
    sync_directory(dest)


def _refuse_other_held(dest: Path, identity: dict[str, Any]) -> None:
    try:
        held = json.loads((dest / HELD).read_bytes())
        same = all(held[key] == value for key, value in identity.items())
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise StoreError(
            f"{dest} holds another conversion, which has not passed its gate; delete it or choose another "
            "directory"
        )


def finished_store(dest: Path, identity: dict[str, Any]) -> Store | None:
    """The store in `dest`, also one that is held back, which it is no more; None where there is none yet.

    StoreError when it is another one than that of this identity.
    """
    if (dest / HELD).exists():
        _refuse_other_held(dest, identity)
        release(dest)
    if not (dest / MANIFEST).exists():
        return None
    store = Store.open(dest)
    if (store.source, store.options) != (identity["source"], identity["options"]):
        raise StoreError(
            f"{dest} is already a store, made from another checkpoint or with other options "
            f"({store.options}); delete it or choose another directory"
        )
    remove_notes(dest)
    return store


def remove_notes(dest: Path) -> None:
    """What only an unfinished conversion needs."""
    for states in dest.glob(STATES):
        states.unlink()
    (dest / JOURNAL).unlink(missing_ok=True)
