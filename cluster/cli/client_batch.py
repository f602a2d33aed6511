"""`headrace client batch`: batches of a server that was started with --grpc-port and --files."""

import json as json_module
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from headrace.cluster.cli.client import Json, ServerAddress
from headrace.cluster.cli.option_groups import takes_options
from headrace.scheduler.errors import HeadraceError

if TYPE_CHECKING:
    from headrace.client import BatchJob

app = typer.Typer(
    help="Have many requests answered when nobody else needs the server.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

BatchId = Annotated[str, typer.Argument(help="As `submit` printed it.")]


@app.command()
@takes_options
def submit(
    file: Annotated[typer.FileBinaryRead, typer.Argument(help="OpenAI's JSON lines, - for stdin.")],
    server: ServerAddress,
    endpoint: Annotated[
        str | None, typer.Option(help="The url of all lines. \\[default: that of the first]")
    ] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="NAME=VALUE. Repeatable.")] = None,
    json: Json = False,
) -> None:
    """Make a batch of the lines of a file, and print its id."""
    lines: Iterable[bytes] = file
    if endpoint is None:
        first = next(iter(file), b"")
        endpoint, lines = _url(first), chain([first], file)
    told = dict(_pair(each) for each in metadata or ())
    with server.client() as client:
        made = client.batches.submit(lines, endpoint, metadata=told)
        typer.echo(json_module.dumps(asdict(made)) if json else made.id)


@app.command()
@takes_options
def status(batch_id: BatchId, server: ServerAddress, json: Json = False) -> None:
    """Print what has become of a batch."""
    with server.client() as client:
        _print(client.batches.get(batch_id), as_json=json)


@app.command("list")
@takes_options
def list_batches(
    server: ServerAddress,
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Go on behind this id.")] = None,
    json: Json = False,
) -> None:
    """Print the batches of the key, the newest first."""
    with server.client() as client:
        for job in client.batches.list(limit, after).batches:
            _print(job, as_json=json)


@app.command()
@takes_options
def cancel(batch_id: BatchId, server: ServerAddress, json: Json = False) -> None:
    """Have lines that have not ended end with an error."""
    with server.client() as client:
        _print(client.batches.cancel(batch_id), as_json=json)


@app.command()
@takes_options
def results(
    batch_id: BatchId,
    server: ServerAddress,
    output: Annotated[
        Path | None,
        typer.Option(help="Write here, and go on at its end if it has lines. \\[default: stdout]"),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="For the batch's end.")] = False,
) -> None:
    """Print the answers of a batch that has ended, and then its errors, as JSON lines."""
    with server.client() as client:
        if output is None:
            for result in client.batches.results(batch_id, wait=wait):
                typer.echo(result.line)
            return
        try:
            with output.open("ab+") as file:
                offset = _whole_lines(file)
                for result in client.batches.results(batch_id, offset, wait=wait):
                    file.write(result.line.encode() + b"\n")
        except OSError as error:
            raise HeadraceError(f"cannot write --output {output}: {error.strerror}") from error


def _whole_lines(file: BinaryIO) -> int:
    """Cut off the half of a line at a file's end; returns its bytes then, which are the offset in the
    results."""
    file.seek(0)
    size = sum(len(line) for line in file if line.endswith(b"\n"))
    file.truncate(size)
    return size


def _url(line: bytes) -> str:
    try:
        return str(json_module.loads(line)["url"])
    except (ValueError, KeyError, TypeError) as error:
        raise HeadraceError("the first line has no url: give --endpoint") from error


def _pair(given: str) -> tuple[str, str]:
    name, sign, value = given.partition("=")
    if not sign:
        raise HeadraceError(f"--metadata {given}: give NAME=VALUE")
    return name, value


def _print(job: "BatchJob", *, as_json: bool) -> None:
    if as_json:
        typer.echo(json_module.dumps(asdict(job)))
        return
    lines = f"{job.completed} answered, {job.failed} failed of {job.total} lines"
    typer.echo(f"{job.id}  {job.status:11}  {lines}")
    for error in job.errors:
        where = "" if error.line is None else f"line {error.line}: "
        typer.echo(f"  {where}{error.message}")
