"""`headrace client`: what a server's gRPC port can be asked, from a terminal."""

import json as json_module
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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

Address = Annotated[
    str, typer.Option(envvar="HEADRACE_ADDRESS", help="HOST:PORT, as `headrace serve` prints it.")
]
KeyFile = Annotated[
    Path | None, typer.Option(help="A file with the API key, readable by nobody else.")
]
Tls = Annotated[bool, typer.Option("--tls", help="Over TLS, by this machine's certificates.")]
CaFile = Annotated[Path | None, typer.Option(help="Over TLS, by the certificates in this file.")]
Json = Annotated[bool, typer.Option("--json", help="For machines.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What is continued, or said with --chat.")],
    address: Address,
    key_file: KeyFile = None,
    tls: Tls = False,
    ca_file: CaFile = None,
    chat: Annotated[bool, typer.Option("--chat", help="Through the chat template.")] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the answer. Repeatable.")] = None,
    priority: Annotated[Priority | None, typer.Option()] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds for all of the answer.")
    ] = None,
    request_id: Annotated[str | None, typer.Option(help="For `headrace client abort`.")] = None,
    json: Annotated[bool, typer.Option("--json", help="A line for each piece.")] = False,
) -> None:
    """Print an answer as it comes. Ctrl-C gives it up."""
    asked = [{"role": "user", "content": prompt}] if chat else prompt
    with (
        connect(address, key_file, tls, ca_file) as client,
        client.generate(
            asked,
            timeout=timeout,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            priority=priority,
            request_id=request_id,
        ) as stream,
    ):
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
def info(
    address: Address,
    key_file: KeyFile = None,
    tls: Tls = False,
    ca_file: CaFile = None,
    json: Json = False,
) -> None:
    """Print what is served, and its limits."""
    with connect(address, key_file, tls, ca_file) as client:
        _show({**asdict(client.model_info()), **asdict(client.server_info())}, as_json=json)


@app.command()
def loads(
    address: Address,
    key_file: KeyFile = None,
    tls: Tls = False,
    ca_file: CaFile = None,
    json: Json = False,
) -> None:
    """Print what the server is doing."""
    with connect(address, key_file, tls, ca_file) as client:
        _show(asdict(client.loads()), as_json=json)


@app.command()
def abort(
    request_id: Annotated[str, typer.Argument(help="As `generate --request-id` had it.")],
    address: Address,
    key_file: KeyFile = None,
    tls: Tls = False,
    ca_file: CaFile = None,
) -> None:
    """Give up a request of the same key. Exit code 1 when there is none."""
    with connect(address, key_file, tls, ca_file) as client:
        if not client.abort(request_id):
            raise HeadraceError(f"no request {request_id!r} of this key is running")


def connect(address: str, key_file: Path | None, tls: bool, ca_file: Path | None) -> "Client":
    from headrace.cluster.client.client import Client

    key = None if key_file is None else read_key(key_file)
    return Client(address, api_key=key, tls=tls, ca_file=ca_file)


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
        typer.echo(f"{name.replace('_', ' '):18} {value}")
