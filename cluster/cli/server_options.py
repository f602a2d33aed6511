"""Options of `headrace serve`: who may ask the server, what for, and how much."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headrace.cluster.cli.sizes import parse_duration, parse_size
from headrace.scheduler.batch_window import LONGEST

if TYPE_CHECKING:
    from headrace.cluster.serving.server import ServerOptions
    from headrace.cluster.serving.shadow.options import ShadowOptions


@dataclass(frozen=True)
class ServerFlags:
    """As they are written."""

    host: Annotated[
        str,
        typer.Option(
            help="Where to listen. Another one than this machine's own needs keys and TLS."
        ),
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000
    grpc_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Serve gRPC, too, at this port. 0 takes a free one."),
    ] = None
    model_name: Annotated[
        str | None,
        typer.Option(help="What clients call the model. \\[default: the store's folder]"),
    ] = None
    api_keys: Annotated[
        Path | None, typer.Option(help="Who may use the server: a file that serve-key makes.")
    ] = None
    tls_cert: Annotated[
        Path | None, typer.Option(help="A certificate chain in PEM, to serve HTTPS.")
    ] = None
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key in PEM.")] = None
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", help="Listen anywhere without keys or TLS: all who reach it may."
        ),
    ] = False
    max_waiting: Annotated[
        int,
        typer.Option(
            min=1, help="Sequences of a key and class that wait for a first token; more get a 429."
        ),
    ] = 256
    max_ttft: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Seconds to the first token: interactive requests that would wait longer get a 429.",
        ),
    ] = None
    batch_window: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=LONGEST,
            help="Seconds for which an idle ring holds its first pass for others to join; 0: not at all."
            " \\[default: 5 % of what the pass takes, 0.1 at most]",
        ),
    ] = None
    max_body: Annotated[str, typer.Option(help="The largest request.")] = "4MiB"
    max_connections: Annotated[
        int,
        typer.Option(min=1, help="Of clients at once at each port; those that idle make room."),
    ] = 1000
    grace: Annotated[
        float,
        typer.Option(min=0, help="Seconds for requests that run to finish, once told to stop."),
    ] = 30.0
    files: Annotated[
        Path | None,
        typer.Option(
            help="A directory of the server's own for uploads and results: turns on /v1/files and"
            " /v1/batches."
        ),
    ] = None
    files_max_bytes: Annotated[str, typer.Option(help="What all files together may take.")] = (
        "10GiB"
    )
    file_max_bytes: Annotated[str, typer.Option(help="The largest file.")] = "512MiB"
    files_ttl: Annotated[
        str, typer.Option(help="How long files are kept, unless they end sooner.")
    ] = "30d"

    def chosen(self, store: Path, shadow: "ShadowOptions | None") -> "ServerOptions":
        """HeadraceError for a malformed size or time."""
        from headrace.cluster.serving.batches.file_store import FileLimits
        from headrace.cluster.serving.server import ServerOptions

        given = asdict(self)
        ttl = int(parse_duration(given.pop("files_ttl")))
        total, each = (
            parse_size(given.pop(name)) for name in ("files_max_bytes", "file_max_bytes")
        )
        given["max_body"] = parse_size(self.max_body)
        if self.model_name is None:
            given["model_name"] = store.resolve().name
        return ServerOptions(**given, limits=FileLimits(total, each, ttl), shadow=shadow)
