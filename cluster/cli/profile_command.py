"""`headrace profile`: where the memory of a run goes."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cluster.cli.option_groups import takes_options
from headrace.cluster.cli.options import RunOptions, StoreArgument
from headrace.cluster.cli.ring_options import RingOptions


@takes_options
def profile_run(
    store: StoreArgument,
    *,
    input: Annotated[
        Path | None, typer.Option(help="Rows to run instead of random prompts, as generate does.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Random prompts. \\[default: as many as run at once]")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Each with its answer. \\[default: the context that is planned]"),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="The load's time at most.")] = 60.0,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    run: RunOptions,
    ring: RingOptions,
) -> None:
    """Run a load and say where the memory of each process went, beside what the plan says.

    Exit code 1 if more than 5 % of a process's memory is unexplained.
    """
    from headrace.cluster.cli.profile import profile_json, render_profile
    from headrace.cluster.profile import run as profile
    from headrace.cluster.profile.request import Load

    made = profile.profile_run(
        run.engine(store, **ring.chosen()), Load(input, sequences, tokens, seconds)
    )
    described, console = profile_json(made), Console()
    if json:
        console.print_json(data=described)
    else:
        console.print(render_profile(made))
    raise typer.Exit(0 if described["explained"] else 1)
