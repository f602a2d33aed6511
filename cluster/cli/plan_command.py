"""`headrace plan`: for this machine, or for hardware that is written down."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cluster.cli.bench_options import WeightFormat
from headrace.cluster.cli.option_groups import takes_options
from headrace.cluster.cli.options import RunOptions, StoreArgument
from headrace.cluster.cli.ring_options import ColdOption
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.sizes import format_size


@dataclass(frozen=True)
class WhatIfOptions:
    """Hardware that is written down, and what is asked of it."""

    what_if: Annotated[
        Path | None, typer.Option(help="Pools of other hardware to plan for: nodes.yaml.")
    ] = None
    prices: Annotated[
        Path | None, typer.Option(help="Instances that the pools name: prices.yaml.")
    ] = None
    format: Annotated[
        WeightFormat, typer.Option(help="Of a model shape that is named instead of a store.")
    ] = WeightFormat.NF4
    job_tokens: Annotated[
        int, typer.Option(min=1, help="Output tokens of the job to be priced.")
    ] = 1_000_000


@takes_options
def plan_run(
    store: StoreArgument,
    *,
    cold: ColdOption = None,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    elsewhere: WhatIfOptions,
    run: RunOptions,
) -> None:
    """Print what a run on this machine would keep where, how fast it would be and what binds it.

    With --what-if, on hardware that is described in a file; the model may then be a shape by its name,
    such as 70b or deepseek-v3.
    """
    console = Console()
    if elsewhere.what_if is not None:
        raise typer.Exit(_elsewhere(console, run, store, elsewhere, as_json=json))
    if elsewhere.prices is not None:
        raise HeadraceError("--prices is for --what-if: name the pools to plan for, too")
    from headrace.cluster.cli.plan import plan_json, render_plan
    from headrace.cluster.hydration import cold_model, open_store
    from headrace.cluster.run_plan import local_plan

    made = local_plan(run.engine(store), open_store(store, cold_model(store, cold)))
    if json:
        console.print_json(data=plan_json(made))
    else:
        console.print(render_plan(made))


def _elsewhere(
    console: Console, run: RunOptions, store: Path, asked: WhatIfOptions, *, as_json: bool
) -> int:
    """Print what hardware that is written down would do. Returns the exit code: 1 where none can run it."""
    from headrace.cluster.cli.what_if import ask, find_store, render, what_if_json

    assert asked.what_if is not None
    opened = find_store(store, asked.format.value)
    found = ask(opened, run.engine(store), asked.what_if, asked.prices)
    if as_json:
        console.print_json(data=what_if_json(found, asked.job_tokens))
    else:
        title = f"{store.name}, {format_size(opened.nbytes)} in {opened.format}"
        console.print(render(title, found, asked.job_tokens))
    return 0 if any(outcome.plan for outcome in found) else 1
