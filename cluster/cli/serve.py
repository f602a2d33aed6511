"""`headrace serve` and `serve-key`: a model for OpenAI's clients."""

from pathlib import Path
from typing import Annotated

import typer

from headrace.cluster.cli.option_groups import takes_options
from headrace.cluster.cli.options import RunOptions
from headrace.cluster.cli.ring_options import RingOptions
from headrace.cluster.cli.shadow_options import ShadowFlags
from headrace.cluster.cli.sizes import parse_duration, parse_size


@takes_options
def serve(
    run: RunOptions,
    ring: RingOptions,
    shadow: ShadowFlags,
    store: Annotated[Path, typer.Argument(help="A store made by `headrace convert`.")],
    host: Annotated[
        str,
        typer.Option(
            help="Where to listen. Another one than this machine's own needs keys and TLS."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    grpc_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Serve gRPC, too, at this port. 0 takes a free one."),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(help="What clients call the model. \\[default: the store's folder]"),
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="Who may use the server: a file that serve-key makes.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="A certificate chain in PEM, to serve HTTPS.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key in PEM.")] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure", help="Listen anywhere without keys or TLS: all who reach it may."
        ),
    ] = False,
    max_waiting: Annotated[
        int,
        typer.Option(
            min=1, help="Sequences of a key and class that wait for a first token; more get a 429."
        ),
    ] = 256,
    max_ttft: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Seconds to the first token: interactive requests that would wait longer get a 429.",
        ),
    ] = None,
    max_body: Annotated[str, typer.Option(help="The largest request.")] = "4MiB",
    max_connections: Annotated[
        int,
        typer.Option(min=1, help="Of clients at once at each port; those that idle make room."),
    ] = 1000,
    grace: Annotated[
        float,
        typer.Option(min=0, help="Seconds for requests that run to finish, once told to stop."),
    ] = 30.0,
    files: Annotated[
        Path | None,
        typer.Option(
            help="A directory of the server's own for uploads and results: turns on /v1/files and"
            " /v1/batches."
        ),
    ] = None,
    files_max_bytes: Annotated[
        str, typer.Option(help="What all files together may take.")
    ] = "10GiB",
    file_max_bytes: Annotated[str, typer.Option(help="The largest file.")] = "512MiB",
    files_ttl: Annotated[
        str, typer.Option(help="How long files are kept, unless they end sooner.")
    ] = "30d",
) -> None:
    """Serve a model over HTTP, as OpenAI's clients know it. Ctrl-C lets running requests finish."""
    import asyncio
    import gc

    from headrace.cluster.adapters import check_adapter_options
    from headrace.cluster.cli.opened import opened_store
    from headrace.cluster.launch import running_engine
    from headrace.cluster.serving.adapters import check_not_model
    from headrace.cluster.serving.batches.file_store import FileLimits
    from headrace.cluster.serving.server import Listener, Server, ServerOptions

    engine_options = run.engine(store, **ring.chosen())
    opened = opened_store(store, ring.cold)
    options = ServerOptions(
        model_name=store.resolve().name if model_name is None else model_name,
        host=host,
        port=port,
        grpc_port=grpc_port,
        api_keys=api_keys,
        tls_cert=tls_cert,
        tls_key=tls_key,
        insecure=insecure,
        max_waiting=max_waiting,
        max_ttft=max_ttft,
        max_body=parse_size(max_body),
        max_connections=max_connections,
        grace=grace,
        files=files,
        limits=FileLimits(
            parse_size(files_max_bytes), parse_size(file_max_bytes), int(parse_duration(files_ttl))
        ),
        shadow=shadow.chosen(opened, engine_options),
    )
    check_not_model(engine_options.adapters, options.model_name)
    check_adapter_options(engine_options)
    # The address first: starting the engine takes long, and a mistake in it should not.
    with Listener(options) as listener, running_engine(engine_options) as engine:
        server = Server(listener, engine)
        # Hundreds of thousands of objects that stay: a body of many would have them all looked through, and
        # clients would wait.
        gc.freeze()
        served = f"{options.model_name} is served at"
        grpc = "" if listener.grpc_address is None else f" and over gRPC at {listener.grpc_address}"
        asyncio.run(server.run(lambda url: typer.echo(f"{served} {url}{grpc}")))


def serve_key(
    name: Annotated[str, typer.Argument(help="Whose key it is; shows in no answer.")],
    file: Annotated[Path, typer.Option(help="For --api-keys; made if need be.")],
    requests: Annotated[
        int | None,
        typer.Option(min=1, max=999999, help="At once, at most. \\[default: any number]"),
    ] = None,
    weight: Annotated[
        int,
        typer.Option(min=1, max=999, help="Its share where keys wait for each other, in parts."),
    ] = 1,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, max=999_999, help="RPM. \\[default: any number]")
    ] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(
            min=1, max=999_999_999, help="TPM, of prompts and answers. \\[default: any number]"
        ),
    ] = None,
    operator: Annotated[
        bool,
        typer.Option(
            "--operator",
            help="May record the ring (headrace trace), and see where its processes are.",
        ),
    ] = False,
) -> None:
    """Make an API key and print it, once: the file keeps a hash of it."""
    from headrace.cluster.serving.keys import add_key

    typer.echo(
        add_key(
            file,
            name,
            requests,
            weight,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            operator=operator,
        )
    )
