"""`headrace bench serve`: a load for a server, and what became of it."""

import asyncio
import json as json_module
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from headrace.cluster.cli.bench_options import JsonOption
from headrace.cluster.cli.option_groups import takes_options
from headrace.scheduler.request import Priority

if TYPE_CHECKING:
    from headrace.cluster.bench.serve_load import Load


@dataclass(frozen=True)
class LoadOptions:
    """What is sent, and how often."""

    rate: Annotated[
        list[float],
        typer.Option(min=0, help="Requests a second; 0: --concurrency under way. Repeatable."),
    ]
    duration: Annotated[float, typer.Option(min=1, help="Seconds that count, for each rate.")] = 60
    warmup: Annotated[float, typer.Option(min=0, help="Seconds before them that do not.")] = 5
    concurrency: Annotated[
        int, typer.Option(min=1, help="Requests at once; others wait, on the clock.")
    ] = 256
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64
    new: Annotated[int, typer.Option(min=1, help="Tokens generated after it.")] = 64
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="HEADRACE_API_KEY", help="Requests are of all keys alike. Repeatable."),
    ] = None
    priority: Annotated[Priority | None, typer.Option(help="Sent with each request.")] = None
    max_ttft_ms: Annotated[
        int | None, typer.Option(min=1, help="Sent, too: the first token within so many ms.")
    ] = None
    deadline_ms: Annotated[
        int | None, typer.Option(min=1, help="Sent, too: all of an answer within so many ms.")
    ] = None
    seed: Annotated[int, typer.Option(help="Of arrival times and prompts.")] = 0

    @property
    def loads(self) -> "list[Load]":
        """One for each rate."""
        from headrace.cluster.bench.serve_load import Load

        given = asdict(self)
        rates, given["output"] = given.pop("rate"), given.pop("new")
        given["keys"] = tuple(given.pop("api_key") or [""])
        given["priority"] = None if self.priority is None else self.priority.value
        return [Load(rate=rate, **given) for rate in rates]


@takes_options
def serve_load(
    url: Annotated[str, typer.Argument(help="Of a server, such as http://127.0.0.1:8000.")],
    options: LoadOptions,
    json: JsonOption = None,
) -> None:
    """Send a server streamed completions at random times, and print how it bore them.

    Arrivals do not wait for answers, as people do not: times count from when a request was due.
    """
    from headrace.cluster.bench.serve_report import run_loads
    from headrace.cluster.cli.bench import check_writable
    from headrace.cluster.cli.bench_serve_table import name_of, serve_table

    check_writable(json)
    console = Console()
    with console.status("sending ...") as status:

        def told(load: "Load") -> None:
            status.update(f"sending {name_of(load)} ...")

        reports = asyncio.run(run_loads(url, options.loads, told))
    console.print(serve_table(url, reports))
    if json is not None:
        json.write_text(json_module.dumps([each.to_json() for each in reports], indent=1))
