"""What `headrace kv` prints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from headrace.runtime.kv_log.endurance import DriveWear
from headrace.runtime.kv_log.receipt import Receipt
from headrace.runtime.kv_log.segment import Found
from headrace.runtime.kv_log.start import Strange
from headrace.runtime.kv_log.verify import Verified
from headrace.scheduler.sizes import format_size


def segments_table(found: Sequence[Found], in_use: bool, now: float) -> Table:
    table = Table(title="Segments", title_justify="left")
    table.add_column("segment", justify="right", no_wrap=True)
    table.add_column("tenant", overflow="fold")
    for name in ("cohort", "pages", "size", "age"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("encrypted", no_wrap=True)
    for segment in found:
        table.add_row(
            str(segment.number),
            Text(segment.header.tenant),
            str(segment.header.cohort),
            f"{len(segment.entries):,}",
            format_size(segment.nbytes),
            _age(now - segment.header.created),
            _state(segment, in_use),
            _encrypted(segment, in_use),
        )
    return table


def _state(segment: Found, in_use: bool) -> str:
    return "sealed" if segment.sealed else "written to" if in_use else "cut off"


def _encrypted(segment: Found, in_use: bool) -> str:
    """A key in memory only is lost with its process."""
    if not segment.encrypted:
        return "no"
    return "key lost" if segment.header.ephemeral and not in_use else "yes"


def summary_table(
    directory: Path, found: Sequence[Found], in_use: bool, written: int | None, wear: DriveWear
) -> Table:
    table = Table.grid(padding=(0, 2))
    pages, payload = sum(len(s.entries) for s in found), sum(s.payload for s in found)
    size = sum(s.nbytes for s in found)
    table.add_row("directory", Text(f"{directory}{', in use' if in_use else ''}"))
    if found:
        over = f", {size / payload:.3f} bytes a byte of page" if payload else ""
        table.add_row("pages", f"{pages_text(pages)}, {format_size(payload)}")
        table.add_row("files", f"{_count(len(found), 'segment')}, {format_size(size)}{over}")
        cohorts = {(s.header.run, s.header.tenant, s.header.cohort) for s in found}
        tenants = {s.header.tenant for s in found}
        table.add_row("of", f"{_count(len(tenants), 'tenant')}, {_count(len(cohorts), 'cohort')}")
    else:
        table.add_row("pages", "none")
    if written is not None:
        table.add_row("written", f"{format_size(written)} since there is a daily budget")
    table.add_row("drive", str(wear))
    if wear.written_since_boot is not None:
        size = wear.written_since_boot
        table.add_row("", f"{format_size(size)} written to {wear.device} since boot, by everything")
    return table


def strange_text(strange: Sequence[Strange]) -> Text:
    lines = [f"{each.path.name} {each.why}" for each in strange]
    return Text("\n".join(lines), style="yellow")


def bad_table(results: Sequence[Verified]) -> Table:
    table = Table(title="Pages that cannot be read", title_justify="left")
    table.add_column("file", no_wrap=True)
    table.add_column("tenant", overflow="fold")
    table.add_column("pages", justify="right")
    table.add_column("of them")
    for result in results:
        bad = ", ".join(f"{count:,} {miss.value}" for miss, count in result.bad.items())
        pages = f"{len(result.found.entries):,}"
        table.add_row(result.found.path.name, Text(result.found.header.tenant), pages, bad)
    return table


def verdict(results: Sequence[Verified], damaged: Sequence[Strange], left_out: int) -> Text:
    bad = sum(sum(result.bad.values()) for result in results)
    good = sum(result.good for result in results)
    locked = sum(r.good for r in results if r.found.encrypted and not r.decrypted)
    text = Text(f"{pages_text(good)} in {_count(len(results), 'segment')} are good")
    if locked:
        text.append(f"; {locked:,} of them by their checksums alone, without their key")
    cut = sum(not result.found.sealed for result in results)
    if cut:
        verb = "was" if cut == 1 else "were"
        text.append(f"; {_count(cut, 'segment')} {verb} cut off, by a kill or a truncation")
    if bad or damaged:
        text.append(f"; {pages_text(bad)} cannot be read", style="bold red")
        if damaged:
            text.append(f"; {_count(len(damaged), 'file')} without a header", style="bold red")
        text.append(". A run computes them again")
    if left_out:
        text.append(f"; {_count(left_out, 'segment')} that a process writes to left out")
    return text


def receipt_table(receipt: Receipt) -> Table:
    table = Table(title="Deleted", title_justify="left", show_header=False, box=None)
    table.add_row("what", Text(receipt.what))
    table.add_row("pages", f"{pages_text(receipt.pages)}, {format_size(receipt.bytes)}")
    size = format_size(receipt.file_bytes)
    table.add_row("files", f"{_count(receipt.segments, 'segment')}, {size}")
    if receipt.key_destroyed:
        key = "destroyed"
    elif receipt.encrypted:
        key = "still in its file; delete it, too, with --key-file"
    else:
        key = "none: not all pages were encrypted, and a drive may keep deleted blocks for a while"
    if receipt.segments or receipt.key_destroyed:
        table.add_row("key", key)
    table.add_row("at", receipt.at)
    if receipt.digest:
        table.add_row("digest", Text(receipt.digest, no_wrap=True, overflow="fold"))
    for name in receipt.left:
        table.add_row("not deleted", Text(name, style="bold red"))
    return table


def segment_json(segment: Found, in_use: bool) -> dict[str, Any]:
    header = segment.header
    return {
        "file": segment.path.name,
        "tenant": header.tenant,
        "cohort": header.cohort,
        "generation": header.generation,
        "identity": header.identity.hex(),
        "created": header.created,
        "pages": len(segment.entries),
        "page_bytes": segment.payload,
        "file_bytes": segment.nbytes,
        "encrypted": _encrypted(segment, in_use),
        "state": _state(segment, in_use),
    }


def verified_json(result: Verified) -> dict[str, Any]:
    return {
        "file": result.found.path.name,
        "tenant": result.found.header.tenant,
        "good": result.good,
        "bad": {miss.value: count for miss, count in result.bad.items()},
        "encrypted": result.found.encrypted,
        "decrypted": result.decrypted,
    }


def pages_text(count: int) -> str:
    return _count(count, "page")


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
