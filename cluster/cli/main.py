"""`headrace`: convert, prune, inspect, eval, push, pull, cold, plan, generate, profile, explain, serve, top, trace, client, job, bench, kv, doctor."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from headrace import __version__
from headrace.cluster.cli.bench import app as bench_app
from headrace.cluster.cli.bench_serve import serve_load
from headrace.cluster.cli.client import app as client_app
from headrace.cluster.cli.client_batch import app as client_batch_app
from headrace.cluster.cli.cold import app as cold_app
from headrace.cluster.cli.cold import pull, push
from headrace.cluster.cli.convert_command import convert_checkpoint, inspect_store
from headrace.cluster.cli.doctor import doctor
from headrace.cluster.cli.evaluate_command import evaluate_stores
from headrace.cluster.cli.explain_command import explain_run
from headrace.cluster.cli.generate_command import generate_rows
from headrace.cluster.cli.job import app as job_app
from headrace.cluster.cli.kv import app as kv_app
from headrace.cluster.cli.plan_command import plan_run
from headrace.cluster.cli.profile_command import profile_run
from headrace.cluster.cli.prune_command import prune_model
from headrace.cluster.cli.serve import serve, serve_key
from headrace.cluster.cli.top import top
from headrace.cluster.cli.trace import trace_ring
from headrace.cluster.offline import OFFLINE, OURS
from headrace.scheduler.errors import HeadraceError

# Before transformers is imported: nothing may look on the network for what was not asked for by name (headrace.cluster.hub).
os.environ.setdefault(OFFLINE, OURS)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Before gRPC is, which Ray does: it would write what a server's clients send to stderr, as it is.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

app = typer.Typer(
    help="Headrace runs language models that do not fit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
app.add_typer(cold_app, name="cold")
app.add_typer(kv_app, name="kv")
client_app.add_typer(client_batch_app, name="batch")
app.add_typer(client_app, name="client")
app.add_typer(job_app, name="job")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is decided.")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("headrace").setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("headrace.cluster.cli").setLevel(logging.INFO)
    if verbose:
        os.environ["HEADRACE_LOG"] = "INFO"
    if version:
        typer.echo(f"headrace {__version__}")
        raise typer.Exit


app.command("convert")(convert_checkpoint)
app.command("inspect")(inspect_store)
app.command("prune")(prune_model)
app.command("eval")(evaluate_stores)
app.command("plan")(plan_run)
app.command("generate")(generate_rows)
bench_app.command("serve")(serve_load)
app.command("profile")(profile_run)
app.command()(doctor)
app.command()(push)
app.command()(pull)
app.command("explain")(explain_run)
app.command()(serve)
app.command("serve-key")(serve_key)
app.command()(top)
app.command("trace")(trace_ring)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors of the user's are one message and exit code 1.

    `arguments` are the process's own by default.
    """
    try:
        app(arguments)
    except HeadraceError as error:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"[bold red]error:[/] {_escape(str(error))}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
