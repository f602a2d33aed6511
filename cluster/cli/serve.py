"""`headrace serve` and `serve-key`: a model for OpenAI's clients."""

from pathlib import Path
from typing import Annotated

import typer

from headrace.cluster.cli.option_groups import takes_options
from headrace.cluster.cli.options import RunOptions, StoreArgument
from headrace.cluster.cli.ring_options import RingOptions
from headrace.cluster.cli.server_options import ServerFlags
from headrace.cluster.cli.shadow_options import ShadowFlags


@takes_options
def serve(
    store: StoreArgument,
    flags: ServerFlags,
    run: RunOptions,
    ring: RingOptions,
    shadow: ShadowFlags,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients know it. Ctrl-C lets running requests finish."""
    import asyncio
    import gc

    from headrace.cluster.adapters import check_adapter_options
    from headrace.cluster.cli.opened import opened_store
    from headrace.cluster.launch import running_engine
    from headrace.cluster.serving.adapters import check_not_model
    from headrace.cluster.serving.server import Listener, Server

    engine_options = run.engine(store, **ring.chosen())
    opened = opened_store(store, ring.cold)
    options = flags.chosen(store, shadow.chosen(opened, engine_options))
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
