"""Deleting pages of a KV log: from a log that is open, and from a directory that no process holds."""

import threading
from collections.abc import Callable
from pathlib import Path

from headrace.runtime.directory_lock import DirectoryLock
from headrace.runtime.kv_catalog import Catalog, Cohort
from headrace.runtime.kv_keys import KeyRing
from headrace.runtime.kv_receipt import Deleted, Receipt, receipt
from headrace.runtime.kv_segment import Found
from headrace.runtime.kv_start import LEDGER_NAME, cipher_of, segments_in
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
            found, _ = segments_in(directory)
            doomed = [s for s in found if tenant is None or s.header.tenant == tenant]
            if tenant is None:
                (directory / LEDGER_NAME).unlink(missing_ok=True)
            opened = [s.header.ephemeral or cipher_of(s.header, keys) is not None for s in doomed]
            tenants = {segment.header.tenant for segment in doomed}
            if keys is not None:
                tenants.update([tenant] if tenant is not None else keys.tenants())
                for name in tenants:
                    keys.destroy(name)
            return receipt(
                "everything" if tenant is None else f"tenant {tenant}",
                [_delete(*each) for each in zip(doomed, opened, strict=True)],
                key_destroyed=keys is not None or bool(doomed),
            )
    except OSError as error:
        raise KVLogError(f"cannot delete in {directory}: {error.strerror}") from error


def _delete(found: Found, opened: bool) -> Deleted:
    left = False
    try:
        found.path.unlink(missing_ok=True)
    except OSError:
        left = True
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
