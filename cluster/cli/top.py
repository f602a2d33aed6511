"""`headrace top`: rings as they run."""

import json as json_module
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from headrace.cluster.cli.option_groups import takes_options
from headrace.scheduler.errors import HeadraceError

if TYPE_CHECKING:
    from headrace.cluster.top.door import Door
    from headrace.cluster.top.view import Source


@dataclass(frozen=True)
class DoorOptions:
    """How a server over HTTP is opened."""

    key_file: Annotated[
        Path | None,
        typer.Option(help="A file with the API key, readable by nobody else; or HEADRACE_API_KEY."),
    ] = None
    ca_file: Annotated[
        Path | None, typer.Option(help="Certificates that HTTPS trusts, in PEM.")
    ] = None

    def open(self, url: str) -> "Door":
        """A server, with the key that was given, if any was. HeadraceError as of `read_key`."""
        from headrace.cluster.cli.client import read_key
        from headrace.cluster.top.door import Door

        file = self.key_file
        key = os.environ.get("HEADRACE_API_KEY", "") if file is None else read_key(file)
        return Door(url, key, self.ca_file)


@takes_options
def top(
    url: Annotated[
        str | None, typer.Argument(help="Of a server, such as http://127.0.0.1:8000.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="All rings of the Ray cluster at HOST:PORT. \\[default: of this machine]"
        ),
    ] = None,
    *,
    door: DoorOptions,
    once: Annotated[
        bool, typer.Option("--once", help="Print once, for scripts; so it is without a terminal.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines, once.")] = False,
) -> None:
    """Watch rings: share of the bound, where each stage's time goes, what it waits for, recoveries.

    A server is asked itself, every second. Without one Ray's nodes are: here, or of a cluster. Stages and drivers
    report to them every 10 seconds, those of `headrace generate`, too.
    """
    from headrace.cluster.top.watch import as_json, look_once, show_once, watch

    if url is not None and address is not None:
        raise HeadraceError("give the URL of a server or the --address of a Ray cluster, not both")
    console = Console()
    source = _source(url, address, door)
    if json:
        typer.echo(json_module.dumps(as_json(look_once(source), source.place)))
    elif once or not console.is_terminal:
        show_once(source, console)
    else:
        watch(source, console)


def _source(url: str | None, address: str | None, door: DoorOptions) -> "Source":
    if url is not None:
        from headrace.cluster.top.from_server import ServerSource

        return ServerSource(door.open(url))
    from headrace.cluster.top.from_metrics import MetricsSource
    from headrace.cluster.top.nodes import nodes_here, nodes_of

    if address is None:
        return MetricsSource("this machine", nodes_here(), nodes_here)
    with Console(stderr=True).status(f"asking {address} for its nodes ..."):
        return MetricsSource(address, nodes_of(address))
