"""`headrace doctor`: what is right and wrong with a machine or a cluster."""

import json as json_module
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.cluster.doctor.finding import Finding, Status, Subject
from headrace.scheduler.errors import HeadraceError

STYLES = {
    Status.OK: "green",
    Status.WARN: "yellow",
    Status.PROBLEM: "bold red",
    Status.UNCHECKED: "dim",
}
WORDS = {Status.UNCHECKED: "-"}


def doctor(
    store: Annotated[Path | None, typer.Argument(help="A store that will be run.")] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster, of which to look at all nodes. \\[default: this machine]"
        ),
    ] = None,
    interface: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|NETWORK",
            help="With --address, what stages will speak over, as for `headrace generate`.",
        ),
    ] = None,
    kv_directory: Annotated[
        Path | None, typer.Option(help="Where KV pages on NVMe will be.")
    ] = None,
    temporary: Annotated[
        Path | None,
        typer.Option(help="Of temporary files. \\[default: $TMPDIR]", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Look at a machine, or each node of a Ray cluster: what is wrong, and what to do about it.

    Exit code 1 if there is a problem. Speeds are measured by reading the store, for a second, and 64 MiB
    are written to --kv-directory and removed again.
    """
    absolute = (
        None if path is None else path.resolve() for path in (store, kv_directory, temporary)
    )
    subject = Subject(*absolute)
    console, err = Console(), Console(stderr=True)
    with err.status("looking ..."):
        found = _look(subject, address, interface)
    if json:
        typer.echo(json_module.dumps(findings_json(found), indent=2))
    else:
        for name, findings in found.items():
            console.print(findings_table(name, findings))
            console.print()
        console.print(_summary([one for findings in found.values() for one in findings]))
    raise typer.Exit(1 if has_problem(found) else 0)


def _look(
    subject: Subject, address: str | None, interface: str | None
) -> dict[str, tuple[Finding, ...]]:
    """Findings by node; those of all of them are the cluster's."""
    if address is None and interface is not None:
        raise HeadraceError(
            "--interface is of links between nodes: give the cluster's --address, too"
        )
    if address is None:
        from headrace.cluster.doctor.node import look

        report = look(subject)
        return {report.facts.node: report.findings}
    from headrace.cluster.doctor.fleet import look_at_cluster

    cluster = look_at_cluster(subject, address, interface)
    return {**cluster.nodes, "cluster": cluster.findings}


def has_problem(found: dict[str, tuple[Finding, ...]]) -> bool:
    return any(one.status is Status.PROBLEM for findings in found.values() for one in findings)


def findings_table(name: str, findings: Iterable[Finding]) -> Table:
    """A row for each, by area, with what to do below."""
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.title, table.title_justify, table.title_style = name, "left", "bold"
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=False, max_width=24)
    table.add_column(overflow="fold")
    area = None
    for one in findings:
        if one.area != area:
            area = one.area
            table.add_row("", Text(area, style="bold"), "")
        table.add_row(
            Text(WORDS.get(one.status, one.status.value), style=STYLES[one.status]),
            one.check,
            Text(one.found),
        )
        if one.fix:
            table.add_row("", "", Text(f"fix: {one.fix}", style="cyan"))
    return table


def _summary(findings: Iterable[Finding]) -> str:
    counts = Counter(one.status for one in findings)
    return (
        f"{counts[Status.PROBLEM]} problems, {counts[Status.WARN]} warnings, {counts[Status.OK]} in order,"
        f" {counts[Status.UNCHECKED]} not checked"
    )


def findings_json(found: dict[str, tuple[Finding, ...]]) -> dict[str, Any]:
    return {
        "nodes": {
            name: [asdict(one) | {"status": one.status.value} for one in findings]
            for name, findings in found.items()
        },
        "problem": has_problem(found),
    }
