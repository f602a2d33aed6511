"""`headrace explain`: what bound a run, and what each change would buy."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def explain_run(
    run: Annotated[Path, typer.Argument(help="The --output of a run, finished or not.")],
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say what bound a run, how far that was from the plan, and what each change would buy.

    Changes are planned again from what the run measured of its machines; nothing is run.
    """
    from headrace.cluster.cli.explain import explain_json, render
    from headrace.cluster.explain.explanation import explain
    from headrace.cluster.explain.report import read_report

    found = explain(read_report(run))
    console = Console()
    if json:
        console.print_json(data=explain_json(found))
    else:
        console.print(render(found))
