"""Deleting pages of a KV log: from a log that is open, and from a directory that no process holds."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from headrace.runtime.kv_log.catalog import Catalog
from headrace.runtime.kv_log.cohort import Cohort
from headrace.runtime.kv_log.directory_lock import DirectoryLock
from headrace.runtime.kv_log.keys import KeyRing
from headrace.runtime.kv_log.receipt import Deleted, Receipt, receipt
from headrace.runtime.kv_log.segment import Found
from headrace.runtime.kv_log.start import cipher_of, segments_in
from headrace.scheduler.errors import KVLogError


def delete_cohorts(
    catalog: Catalog,
    changed: threading.Condition,
    work_off: Callable[[], None],
    wanted: Callable[[Cohort], bool],
) -> tuple[list[Deleted], int]:
    """What was deleted, and how many pages that only memory had, when the files are gone.

    Waits for reads and writes of them that are under way. `work_off` unlinks what is due.
    """
    with changed:
        cohorts = [cohort for cohort in catalog.cohorts.values() if wanted(cohort)]
        segments = [segment for cohort in cohorts for segment in cohort.segments]
        in_memory = sum(map(catalog.drop, cohorts))
    work_off()
    with changed:
        changed.wait_for(lambda: all(segment.is_gone for segment in segments))
        return [segment.deleted() for segment in segments], in_memory


def purge_directory(directory: Path, tenant: str | None, keys: KeyRing | None) -> Receipt:
    """Delete a tenant's segments, or all with None, and their keys where `keys` has them.

    Files that no log wrote stay. Raises KVLogError while a process holds the directory, and for one that
    cannot be read or written.
    """
    try:
        with DirectoryLock(directory):
            found, strange = segments_in(directory)
            doomed = [s for s in found if tenant is None or s.header.tenant == tenant]
            opened = [s.header.ephemeral or cipher_of(s.header, keys) is not None for s in doomed]
            if keys is not None:
                _destroy_keys(keys, {s.header.tenant for s in doomed}, tenant)
            deleted = [_delete(*each) for each in zip(doomed, opened, strict=True)]
            if tenant is None:
                deleted += [_delete_unread(each.path) for each in strange if each.is_ours]
            return receipt(
                "everything" if tenant is None else f"tenant {tenant}",
                deleted,
                key_destroyed=keys is not None or bool(deleted),
            )
    except OSError as error:
        raise KVLogError(f"cannot delete in {directory}: {error.strerror}") from error


def _destroy_keys(keys: KeyRing, found: set[str], tenant: str | None) -> None:
    """A tenant's key, or all, pages or not: what is on other drives can be read with them, too."""
    for name in sorted(found.union([tenant] if tenant is not None else keys.tenants())):
        keys.destroy(name)


def _delete(found: Found, opened: bool) -> Deleted:
    left = not _unlinked(found.path)
    return Deleted(
        found.path,
        found.header.tenant,
        len(found.entries),
        found.payload,
        found.nbytes,
        found.digest,
        found.encrypted,
        opened,
        left,
    )


def _delete_unread(path: Path) -> Deleted:
    """A segment whose header is damaged: nobody knows whose pages it had."""
    nbytes, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).digest()
    left = not _unlinked(path)
    return Deleted(path, "unknown", 0, 0, nbytes, digest, False, False, left)


def _unlinked(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True
