"""`headrace client`: what a server's gRPC port can be asked, from a terminal."""

import json as json_module
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cluster.cli.option_groups import takes_options
from headrace.runtime.private_file import check_private, explained
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.request import Priority

if TYPE_CHECKING:
    from headrace.cluster.client.client import Client, Stream

app = typer.Typer(
    help="Ask a server that was started with --grpc-port.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="For machines.")]


@dataclass(frozen=True)
class ServerAddress:
    """Where the server is, and how it is spoken to."""

    address: Annotated[
        str,
        typer.Option(envvar="HEADRACE_ADDRESS", help="HOST:PORT, as `headrace serve` prints it."),
    ]
    key_file: Annotated[
        Path | None, typer.Option(help="A file with the API key, readable by nobody else.")
    ] = None
    tls: Annotated[
        bool, typer.Option("--tls", help="Over TLS, by this machine's certificates.")
    ] = False
    ca_file: Annotated[
        Path | None, typer.Option(help="Over TLS, by the certificates in this file.")
    ] = None

    def client(self) -> "Client":
        """HeadraceError as of `read_key`."""
        from headrace.cluster.client.client import Client

        key = None if self.key_file is None else read_key(self.key_file)
        return Client(self.address, api_key=key, tls=self.tls, ca_file=self.ca_file)


@dataclass(frozen=True)
class AnswerOptions:
    """By the names of Client.generate."""

    max_tokens: Annotated[int | None, typer.Option(min=1)] = None
    temperature: Annotated[float | None, typer.Option()] = None
    top_p: Annotated[float | None, typer.Option()] = None
    top_k: Annotated[int | None, typer.Option()] = None
    seed: Annotated[int | None, typer.Option()] = None
    adapter: Annotated[str | None, typer.Option(help="An adapter's name, see `info`.")] = None
    stop: Annotated[list[str] | None, typer.Option(help="Ends the answer. Repeatable.")] = None
    priority: Annotated[Priority | None, typer.Option()] = None
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds for all of the answer.")
    ] = None
    request_id: Annotated[str | None, typer.Option(help="For `headrace client abort`.")] = None


@app.command()
@takes_options
def generate(
    prompt: Annotated[str, typer.Argument(help="What is continued, or said with --chat.")],
    server: ServerAddress,
    *,
    chat: Annotated[bool, typer.Option("--chat", help="Through the chat template.")] = False,
    answer: AnswerOptions,
    json: Annotated[bool, typer.Option("--json", help="A line for each piece.")] = False,
) -> None:
    """Print an answer as it comes. Ctrl-C gives it up."""
    asked = [{"role": "user", "content": prompt}] if chat else prompt
    with server.client() as client, client.generate(asked, **asdict(answer)) as stream:
        _print(stream, as_json=json)


def _print(stream: "Stream", *, as_json: bool) -> None:
    for piece in stream:
        if as_json:
            typer.echo(json_module.dumps(asdict(piece), ensure_ascii=False))
        else:
            typer.echo(piece.text, nl=False)
    if as_json:
        typer.echo(json_module.dumps({"usage": asdict(stream.usage) if stream.usage else None}))
    else:
        typer.echo()


@app.command()
@takes_options
def info(server: ServerAddress, json: Json = False) -> None:
    """Print what is served, and its limits."""
    with server.client() as client:
        _show({**asdict(client.model_info()), **asdict(client.server_info())}, as_json=json)


@app.command()
@takes_options
def loads(server: ServerAddress, json: Json = False) -> None:
    """Print what the server is doing."""
    with server.client() as client:
        _show(asdict(client.loads()), as_json=json)


@app.command()
@takes_options
def abort(
    request_id: Annotated[str, typer.Argument(help="As `generate --request-id` had it.")],
    server: ServerAddress,
) -> None:
    """Give up a request of the same key. Exit code 1 when there is none."""
    with server.client() as client:
        if not client.abort(request_id):
            raise HeadraceError(f"no request {request_id!r} of this key is running")


def read_key(file: Path) -> str:
    """HeadraceError for a file that others can read, or that has no key or more than one."""
    what = "API keys"
    with explained(file, what), file.open("rb") as opened:
        risk = f"others could use it. Run `chmod 600 {file}`"
        check_private(file, os.fstat(opened.fileno()), what, risk)
        words = opened.read(4096).decode("ascii", "replace").split()
    if len(words) != 1:
        raise HeadraceError(f"{file} must hold one API key and nothing else")
    return words[0]


def _show(values: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json_module.dumps(values))
        return
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{count} {state}" for state, count in value.items())
        if isinstance(value, tuple):
            value = ", ".join(f"{each['name']} (of {each['base']})" for each in value) or "none"
        typer.echo(f"{name.replace('_', ' '):18} {value}")
