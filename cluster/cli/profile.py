"""`headrace profile`: the memory of a run, measured and compared with its plan."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from headrace.cluster.cli.plan import describe
from headrace.cluster.profile.account import ENOUGH, UNEXPLAINED, Account, Line
from headrace.cluster.profile.run import Profile
from headrace.scheduler.sizes import format_size

RAY = "Ray"


def render_profile(profile: Profile) -> RenderableType:
    """Tables for a rich console."""
    tables = [table for account in profile.accounts for table in (_account(account), Text())]
    return Group(_summary(profile), Text(), *tables, _processes(profile))


def _summary(profile: Profile) -> Table:
    done, grid = profile.done, Table.grid(padding=(0, 2))
    grid.add_row("placement", describe(profile.plan))
    late = f", {done.requests - done.finished} given up when time was over"
    grid.add_row(
        "load",
        f"{done.requests} requests of up to {done.longest} tokens, {done.passes} passes in"
        f" {done.seconds:.1f} s{late if done.finished < done.requests else ''}",
    )
    return grid


def _account(account: Account) -> Table:
    table = Table(title=account.title, title_justify="left")
    table.add_column("part")
    for name in ("planned", "held", "measured"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in ordered(account):
        style = {"sum": "bold"}.get(line.group)
        if line.name == UNEXPLAINED and not account.is_explained:
            style = "bold red"
        name = f"  {line.name}" if line.group in ("process", "activations") else line.name
        table.add_row(name, *map(_size, (line.planned, line.held, line.measured)), style=style)
    table.add_section()
    table.add_row(f"in all: {account.total_is}", "", "", format_size(account.total), style="bold")
    share = account.unexplained / account.total if account.total else 0.0
    table.caption = f"unexplained: {share:.1%} of the total" + (
        "" if account.is_explained else f", more than {ENOUGH:.0%}"
    )
    table.caption_justify = "left"
    return table


def ordered(account: Account) -> Iterator[Line]:
    """Sums before what they are of."""
    groups = {"the process itself": "process", "activations": "activations"}
    inside = {line.group for line in account.lines if line.group} - {"sum"}
    sums = {groups[line.name]: line for line in account.lines if line.group == "sum"}
    for line in account.lines:
        if not line.group or line.group not in {*sums, "sum"}:
            yield line
    for group, total in sums.items():
        yield total
        if group in inside:
            yield from (line for line in account.lines if line.group == group)


def _size(nbytes: int | None) -> str:
    if nbytes is None:
        return ""
    return f"-{format_size(-nbytes)}" if nbytes < 0 else format_size(nbytes)


def _processes(profile: Profile) -> Table:
    table = Table(title="Processes of the run on this machine", title_justify="left")
    table.add_column("process")
    for name in ("RSS", "PSS", "USS"):
        table.add_column(name, justify="right", no_wrap=True)
    own = [one for one in profile.processes if not one.name.startswith(RAY)]
    ray = [one for one in profile.processes if one.name.startswith(RAY)]
    for one in own:
        table.add_row(one.name, *map(format_size, (one.rss, one.pss, one.uss)))
    if ray:
        sums = (sum(getattr(one, kind) for one in ray) for kind in ("rss", "pss", "uss"))
        table.add_row(f"{len(ray)} processes of Ray's", *map(format_size, sums))
    table.add_section()
    pss = sum(one.pss for one in profile.processes)
    table.add_row("in all, what is shared once", "", format_size(pss), "", style="bold")
    table.add_row("page cache: the store's files", "", format_size(profile.cached), "")
    return table


def profile_json(profile: Profile) -> dict[str, Any]:
    """Everything in bytes and seconds."""
    return {
        "load": asdict(profile.done),
        "accounts": [
            {
                **asdict(account),
                "unexplained": account.unexplained,
                "is_explained": account.is_explained,
            }
            for account in profile.accounts
        ],
        "processes": [asdict(one) for one in profile.processes],
        "page_cache": profile.cached,
        "explained": all(account.is_explained for account in profile.accounts),
    }
