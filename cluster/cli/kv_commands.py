"""What `headrace kv` does: look into a directory of KV pages, read it, or delete it."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console

from headrace.cluster.cli.kv_tables import (
    bad_table,
    pages_text,
    receipt_table,
    segment_json,
    segments_table,
    strange_text,
    summary_table,
    verdict,
    verified_json,
)
from headrace.runtime.kv_log.deletion import purge_directory
from headrace.runtime.kv_log.directory_lock import is_held
from headrace.runtime.kv_log.endurance import drive_wear, read_written
from headrace.runtime.kv_log.keys import KeyRing
from headrace.runtime.kv_log.segment import Found
from headrace.runtime.kv_log.start import LEDGER_NAME, Strange, segments_in
from headrace.runtime.kv_log.verify import verify
from headrace.scheduler.errors import HeadraceError, KVLogError
from headrace.scheduler.sizes import format_size


def list_pages(directory: Path, *, json: bool) -> None:
    """Print segments, and what they hold for whom."""
    found, strange, in_use = _look(directory)
    wear, written = drive_wear(directory), read_written(directory / LEDGER_NAME)
    console, now = Console(), time.time()
    if json:
        console.print_json(
            data={
                "directory": str(directory),
                "in_use": in_use,
                "segments": [segment_json(segment, in_use) for segment in found],
                "unreadable": [{"file": each.path.name, "why": each.why} for each in strange],
                "written": written,
                "drive": asdict(wear),
            }
        )
        return
    if found:
        console.print(segments_table(found, in_use, now))
    console.print(summary_table(directory, found, in_use, written, wear))
    if strange:
        console.print(strange_text(strange))


def verify_pages(directory: Path, key_file: Path | None, *, json: bool) -> None:
    """Read every page; exits with 1 if any is damaged or not what was encrypted."""
    keys = _keys(key_file)
    found, strange, in_use = _look(directory)
    closed = [segment for segment in found if segment.sealed or not in_use]
    console = Console()
    with Console(stderr=True).status(f"reading {len(closed)} segments ..."):
        results = list(verify(closed, keys))
    bad = [result for result in results if not result.is_good]
    damaged = [each for each in strange if each.is_ours]
    left_out = len(found) - len(closed)
    if json:
        console.print_json(
            data={
                "directory": str(directory),
                "segments": [verified_json(result) for result in results],
                "unreadable": [{"file": each.path.name, "why": each.why} for each in strange],
                "left_out": left_out,
                "good": not bad and not damaged,
            }
        )
    else:
        if bad:
            console.print(bad_table(bad))
        if strange:
            console.print(strange_text(strange))
        console.print(verdict(results, damaged, left_out))
    if bad or damaged:
        raise typer.Exit(1)


def purge_pages(
    directory: Path, tenant: str | None, key_file: Path | None, *, yes: bool, json: bool
) -> None:
    """Delete pages of a tenant or of all, and their keys in `key_file`; prints a receipt."""
    keys = _keys(key_file)
    found, _, in_use = _look(directory)
    if in_use:
        raise KVLogError(
            f"{directory} is in use by a process that runs: stop it first, then purge again"
        )
    _check_tenant(directory, found, tenant, keys)
    if not yes:
        _confirm(directory, found, tenant, keys)
    receipt = purge_directory(directory, tenant, keys)
    console = Console()
    if json:
        console.print_json(data=asdict(receipt))
    else:
        console.print(receipt_table(receipt))
    if receipt.left:
        raise typer.Exit(1)


def _look(directory: Path) -> tuple[list[Found], list[Strange], bool]:
    if not directory.is_dir():
        raise KVLogError(f"{directory} is not a directory: name one that holds a stage's KV pages")
    stages = sorted(path for path in directory.glob("stage-*") if path.is_dir())
    if stages:
        raise KVLogError(
            f"{directory} has a folder of KV pages for each stage: name one, such as {stages[0]}"
        )
    try:
        in_use = is_held(directory)
    except OSError as error:
        raise KVLogError(f"cannot look into {directory}: {error.strerror}") from error
    return *segments_in(directory), in_use


def _keys(file: Path | None) -> KeyRing | None:
    if file is not None and not file.exists():
        raise HeadraceError(f"--key-file {file} is not there")
    return None if file is None else KeyRing(file)


def _check_tenant(
    directory: Path, found: Sequence[Found], tenant: str | None, keys: KeyRing | None
) -> None:
    """A misspelt name must not look like a deletion."""
    names = {segment.header.tenant for segment in found}
    if tenant is None or tenant in names or (keys is not None and keys.find(tenant) is not None):
        return
    there = f"there are pages of {', '.join(sorted(names))}" if names else "there are no pages"
    raise KVLogError(f"{directory} has no pages of {tenant!r}; {there}")


def _confirm(
    directory: Path, found: Sequence[Found], tenant: str | None, keys: KeyRing | None
) -> None:
    doomed = [segment for segment in found if tenant is None or segment.header.tenant == tenant]
    whose = "everything" if tenant is None else f"the pages of {tenant!r}"
    pages, nbytes = sum(len(s.entries) for s in doomed), sum(s.nbytes for s in doomed)
    what = f"{whose} in {directory}: {pages_text(pages)}, {format_size(nbytes)}"
    if keys is not None:
        what += f", and {'its key' if tenant else 'all keys'} in {keys.file}"
    if not sys.stdin.isatty():
        raise HeadraceError(f"this deletes {what}. Add --yes to do it")
    if not typer.confirm(f"Delete {what}?", err=True):
        raise typer.Exit(1)
