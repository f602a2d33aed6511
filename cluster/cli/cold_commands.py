"""What `headrace push`, `pull` and `cold` do and print."""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from headrace.cluster.cli.opened import here
from headrace.cluster.cli.progress import byte_bar
from headrace.cluster.cli.sizes import parse_duration
from headrace.runtime.cold.garbage import ModelEntry, TierListing, clean, list_tier, remove
from headrace.runtime.cold.pull import PullReport, Received, everything, pull
from headrace.runtime.cold.push import PushReport, Sent, push
from headrace.runtime.cold.ranges import parse_ranges
from headrace.runtime.cold.source import ColdModel, check_name, parse_cold
from headrace.runtime.manifest import Block
from headrace.runtime.store import Store
from headrace.scheduler.errors import ColdTierError

RATE_BYTES = 1e6


def run_push(store: Path, url: str, *, base: str | None, repair: bool, jobs: int) -> None:
    """Pushes behind a bar and prints what it took. Raises HeadraceError."""
    model, console = parse_cold(url, store), Console()
    if base is not None:
        check_name(base)
    with byte_bar(console) as bar:
        task = bar.add_task("looking")

        def show(sent: Sent) -> None:
            bar.update(task, completed=sent.done, total=sent.total, description=sent.file)

        report = push(store, model, base=base, repair=repair, jobs=jobs, progress=show)
    console.print(_push_table(model, report, base))


def run_pull(url: str, store: Path, *, layers: str | None, verify: bool, jobs: int) -> None:
    """Pulls behind a bar and prints what came. Raises HeadraceError."""
    model, console = parse_cold(url, store), Console()

    def choose(opened: Store) -> Iterable[Block]:
        if layers is None:
            return everything(opened)
        chosen = parse_ranges(layers, len(opened.layers))
        last = len(opened.layers) - 1 in chosen
        return opened.blocks_of(chosen, first=0 in chosen, last=last)

    with byte_bar(console) as bar:
        task = bar.add_task("looking")

        def show(got: Received) -> None:
            bar.update(task, completed=got.done, total=got.total, description=got.file)

        report = pull(model, store, choose, verify=verify, jobs=jobs, progress=show)
    console.print(_pull_table(model, Store.open(store), report))


def run_list(url: str, *, as_json: bool) -> None:
    listing, console = list_tier(_tier(url)), Console()
    if as_json:
        console.print_json(data=_listing_json(listing))
        return
    console.print(_listing_table(listing))
    parts = [f"{decimal(listing.stored)} in all"]
    if listing.orphans:
        parts.append(
            f"{decimal(listing.orphan_bytes)} in {listing.orphans} objects of no model: of a push that "
            "is under way, or was killed (headrace cold clean)"
        )
    console.print(", ".join(parts))


def run_remove(url: str) -> None:
    if "#" not in url:
        raise ColdTierError(
            "which model is to go? Write URL#NAME; headrace cold list URL names them"
        )
    model = parse_cold(url, Path())
    removed = remove(model)
    Console().print(
        f"removed {model}: {removed.objects} objects, {decimal(removed.nbytes)}", markup=False
    )


def run_clean(url: str, older_than: str) -> None:
    removed = clean(_tier(url), parse_duration(older_than))
    Console().print(f"removed {removed.objects} objects, {decimal(removed.nbytes)}")


def _tier(url: str) -> str:
    if "#" in url:
        raise ColdTierError(f"{url} names a model: give the URL alone, what is before the #")
    return parse_cold(f"{url}#any", Path()).url


def _rate(nbytes: int, seconds: float) -> str:
    return f"{nbytes / max(seconds, 1e-9) / RATE_BYTES:.0f} MB/s"


def _push_table(model: ColdModel, report: PushReport, base: str | None) -> Table:
    table = Table.grid(padding=(0, 2))
    fresh = report.nbytes - report.found
    table.add_row("pushed", Text(str(model)))
    table.add_row("store", decimal(report.nbytes))
    table.add_row("already there", decimal(report.found))
    took = f"{decimal(report.stored)} in {report.objects} objects"
    if fresh:
        took += f" for {decimal(fresh)} ({report.stored / fresh:.1%})"
    table.add_row("sent", took)
    if base is not None:
        table.add_row("as differences", f"{report.deltas} objects, from {base}")
    table.add_row(
        "took", f"{report.seconds:.1f} s, {_rate(report.nbytes, report.seconds)} of the store"
    )
    return table


def _pull_table(model: ColdModel, store: Store, report: PullReport) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("pulled", Text(str(model)))
    table.add_row("store", Text(str(store.path)))
    table.add_row("has", here(store))
    if report.damaged:
        table.add_row("was damaged", ", ".join(report.damaged))
    rate = f" in {report.seconds:.1f} s, {_rate(report.fetched, report.seconds)}"
    table.add_row("fetched", decimal(report.fetched) + (rate if report.fetched else ""))
    if report.resumed:
        table.add_row("kept", f"{decimal(report.resumed)} that were there from before")
    return table


def _listing_table(listing: TierListing) -> Table:
    table = Table("model", "pushed", "store", "alone here", "shared", "stored against")
    table.columns[1].no_wrap = True
    for each in listing.models:
        pushed = datetime.fromtimestamp(each.record.created).strftime("%Y-%m-%d %H:%M")
        name = Text(each.record.name)
        if each.missing:
            name.append(f" ({each.missing} objects missing)", style="bold red")
        sizes = [decimal(size) for size in (each.record.nbytes, each.own, each.shared)]
        table.add_row(name, pushed, *sizes, each.record.base or "-")
    return table


def _listing_json(listing: TierListing) -> dict[str, object]:
    return {
        "models": [_entry_json(each) for each in listing.models],
        "stored": listing.stored,
        "orphans": listing.orphans,
        "orphan_bytes": listing.orphan_bytes,
    }


def _entry_json(entry: ModelEntry) -> dict[str, object]:
    record = entry.record
    return {
        "name": record.name,
        "digest": record.digest,
        "created": record.created,
        "base": record.base,
        "nbytes": record.nbytes,
        "own": entry.own,
        "shared": entry.shared,
        "missing": entry.missing,
    }
