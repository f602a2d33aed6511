"""`headrace trace`: a ring that serves, recorded for a while; and what a trace says."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from headrace.cluster.cli.option_groups import takes_options
from headrace.cluster.cli.top import DoorOptions
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.sizes import format_size

if TYPE_CHECKING:
    from headrace.cluster.trace_summary import TraceSummary  # imports Ray

_PATIENCE = 600.0
"""Seconds beside those of the trace: a pass may take a minute, and a recovery minutes."""


@takes_options
def trace_ring(
    target: Annotated[str, typer.Argument(help="The URL of a server, or a trace to be summed up.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write, for ui.perfetto.dev.")
    ] = None,
    passes: Annotated[
        int | None, typer.Option(min=1, max=4096, help="End when so many have returned.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1, max=300, help="End then at the latest. \\[default: 10; with --passes 300]"
        ),
    ] = None,
    *,
    door: DoorOptions,
) -> None:
    """Record what each stage of a ring does while it serves: reads, copies, matmuls, waits, on one clock.

    Of a file that was written before, print where the time went. Only an operator's key may record (serve-key
    --operator), where a server has keys.
    """
    from headrace.cluster.trace_summary import summarize

    if output is None and Path(target).is_file():
        Console().print(render(summarize(Path(target)), target))
        return
    if output is None:
        raise HeadraceError(f"{target} is no file: to record a server, name the file, too: -o FILE")
    most = seconds or (300.0 if passes is not None else 10.0)
    body = {"seconds": most, **({} if passes is None else {"passes": passes})}
    server = door.open(target)
    with Console(stderr=True).status(f"recording {target} for at most {most:g} s ..."):
        found = _record(output, server.post("/trace", body, most + _PATIENCE))
    Console().print(render(found, str(output)))
    size = format_size(output.stat().st_size)
    typer.echo(f"The trace is in {output} ({size}): open it in https://ui.perfetto.dev")


def _record(output: Path, pieces: Iterable[bytes]) -> "TraceSummary":
    """HeadraceError when nothing was recorded: then the file is as it was."""
    from headrace.cluster.trace_file import check_writable, replacing
    from headrace.cluster.trace_summary import summarize

    check_writable(output, "--output")
    with replacing(output) as out:
        out.writelines(pieces)
        out.flush()
        found = summarize(Path(out.name))
        if not any(found.spans.values()):
            raise HeadraceError(
                f"the ring had nothing to do in that time: there is nothing to write to {output}. Send it"
                " requests, or record it for longer (--seconds)"
            )
    return found


def render(found: "TraceSummary", name: str) -> RenderableType:
    """Seconds by kind and process, the longest waits, and what the trace lacks."""
    table = Table(
        title=f"{name}: {found.passes} passes in {found.seconds:.2f} s", title_justify="left"
    )
    table.add_column("seconds (spans)")
    for process in found.nodes:
        table.add_column(process, justify="right")
    for kind in found.kinds:
        cells = (_cell(found, process, kind) for process in found.nodes)
        table.add_row(kind, *cells)
    parts: list[RenderableType] = [table]
    if found.waits:
        parts.append(Text("The longest waits"))
    parts += [
        Text(f"  {wait.seconds * 1e3:9.1f} ms  {wait.process}: {wait.name}, at {wait.at:.3f} s")
        for wait in found.waits
    ]
    parts += [Text(f"note: {note}", style="yellow") for note in found.notes]
    return Group(*parts)


def _cell(found: "TraceSummary", process: str, kind: str) -> str:
    count = found.spans[process][kind]
    return f"{found.times[process][kind]:.3f} ({count})" if count else "-"
