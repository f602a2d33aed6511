"""`headrace`: convert, prune, inspect, eval, push, pull, cold, plan, generate, profile, explain, serve, top, trace, client, job, bench, kv, doctor."""

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace import __version__
from headrace.cluster.cli.bench import app as bench_app
from headrace.cluster.cli.bench_serve import serve_load
from headrace.cluster.cli.calibrate_options import CalibrationOptions
from headrace.cluster.cli.client import app as client_app
from headrace.cluster.cli.client_batch import app as client_batch_app
from headrace.cluster.cli.cold import app as cold_app
from headrace.cluster.cli.cold import pull, push
from headrace.cluster.cli.doctor import doctor
from headrace.cluster.cli.evaluate_command import evaluate_stores
from headrace.cluster.cli.evaluate_options import CorpusOptions
from headrace.cluster.cli.explain_command import explain_run
from headrace.cluster.cli.job import app as job_app
from headrace.cluster.cli.kv import app as kv_app
from headrace.cluster.cli.mix_options import MixOptions
from headrace.cluster.cli.option_groups import takes_options
from headrace.cluster.cli.options import RunOptions, StoreArgument
from headrace.cluster.cli.plan_command import plan_run
from headrace.cluster.cli.profile_command import profile_run
from headrace.cluster.cli.prune_command import prune_model
from headrace.cluster.cli.ring_options import RingOptions
from headrace.cluster.cli.serve import serve, serve_key
from headrace.cluster.cli.top import top
from headrace.cluster.cli.trace import trace_ring
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError

# Before transformers is imported: nothing here may look for a model on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
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


class Format(str, Enum):
    KEEP = "keep"
    BF16 = "bf16"
    INT8 = "int8"
    NF4 = "nf4"
    INT4 = "int4"
    INT3 = "int3"


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


@app.command()
@takes_options
def convert(
    calibration: CalibrationOptions,
    mix: MixOptions,
    corpus: CorpusOptions,
    checkpoint: Annotated[
        Path, typer.Argument(help="A local Hugging Face checkpoint, or a GGUF file.")
    ],
    store: Annotated[Path, typer.Argument(help="The directory to write.")],
    format: Annotated[
        Format | None, typer.Option(help="Of the layers' matrices. \\[default: nf4]")
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=FORMAT for tensors by name; the first match wins. Repeatable."),
    ] = None,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="Quantize NF4's scales, too.")
    ] = False,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Columns that share a scale in int4 and int3: 32, 64 (if not given) or 128."
        ),
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Change what is quantized already; say what it changed."),
    ] = False,
    allow_missing_tokenizer: Annotated[
        bool, typer.Option("--allow-missing-tokenizer", help="Convert without a tokenizer.")
    ] = False,
    gate: Annotated[
        Path | None,
        typer.Option(
            help="Thresholds (YAML) for the store beside the checkpoint over --text; one that crosses them is "
            "held back, with exit code 3."
        ),
    ] = None,
) -> None:
    """Turn a checkpoint into a store. Run it again to resume; one layer is in memory at a time.

    With --calibrate TEXT, roundings follow what matrices are given when the text is read; with --budget, formats
    do, too. Options about other texts and --dtype are the gate's, as in headrace eval; --device and --device-memory are of both.
    """
    from headrace.cluster.cli.conversion import Asked, settle
    from headrace.cluster.cli.convert import run_convert
    from headrace.cluster.cli.gated_convert import GatedConversion
    from headrace.runtime.conversion.selfcheck import check

    asked = Asked(
        None if format is None else format.value, policy or [], double_quant, group_size, requantize
    )
    formats = settle(Console(), checkpoint, asked, mix, calibration, corpus)

    def run() -> Store:
        found = formats()
        return run_convert(
            Console(),
            checkpoint,
            store,
            format=found.format,
            policy=found.policy,
            double_quant=double_quant,
            group_size=found.group_size,
            requantize=requantize,
            allow_missing_tokenizer=allow_missing_tokenizer,
            self_check=check,
            calibration=found.calibration,
        )

    if gate is None:
        corpus.refuse_without_gate(calibrating=calibration.calibrate is not None)
        run()
    else:
        raise typer.Exit(GatedConversion(Console(), checkpoint, store, corpus, gate).run(run))


@app.command()
def inspect(
    store: StoreArgument,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte, check it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Print a store's layers, bytes and formats."""
    from headrace.cluster.cli.convert import run_inspect

    run_inspect(Console(), store, verify=verify, as_json=json)


app.command("prune")(prune_model)
app.command("eval")(evaluate_stores)
app.command("plan")(plan_run)


@app.command()
@takes_options
def generate(
    run: RunOptions,
    ring: RingOptions,
    store: StoreArgument,
    input: Annotated[Path, typer.Option(help="Rows: JSON lines, OpenAI Batch or Parquet.")],
    output: Annotated[Path, typer.Option(help="JSON lines; appended to as rows finish.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Default for rows without it.")] = 256,
    temperature: Annotated[float, typer.Option(help="Default for rows without it.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Default for rows without it.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Default for rows without it.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Changes every row's random numbers.")] = None,
    default_adapter: Annotated[
        str | None, typer.Option(help="Of --adapter, the one of rows that name none.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write what every stage did in its newest 64 passes, for ui.perfetto.dev."
        ),
    ] = None,
) -> None:
    """Run a batch job. Run the same command again to resume it; finished rows are never repeated."""
    from headrace.cluster.adapters import check_adapter_options, opened_adapters
    from headrace.cluster.cli.generate import Setting, run_job
    from headrace.cluster.cli.kv_report import end_of_pages
    from headrace.cluster.cli.opened import opened_store
    from headrace.cluster.explain.report import ReportWriter
    from headrace.cluster.jobs import Job, JobAdapters, JobFiles
    from headrace.cluster.launch import running_engine
    from headrace.cluster.run_plan import kv_alternatives
    from headrace.scheduler.request import SamplingParams

    if trace is not None and trace.resolve() == output.resolve():
        raise HeadraceError(f"--trace {trace} is the --output: choose another --trace")
    options = run.engine(
        store,
        **ring.chosen(),
        trace=trace,
    )
    defaults = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    opened = opened_store(store, ring.cold)
    check_adapter_options(options)
    adapters = JobAdapters.of(opened_adapters(options), default_adapter)
    # The files first: starting the engine takes long, and a mistake in a path should not.
    with (
        JobFiles(input, output, opened.digest, defaults, adapters) as files,
        running_engine(options) as engine,
    ):
        job = Job(engine, engine.tokenizer, files, model_name=store.name)
        setting = Setting(engine.plan, opened.nbytes, options.device_memory)
        assert engine.inputs is not None
        others = kv_alternatives(options, opened)
        notes = ReportWriter(output, store.name, engine.inputs, others, engine.stats)
        code = run_job(
            job,
            setting,
            Console(),
            resume_command=_command(),
            trace=engine.trace,
            kv=lambda: end_of_pages(engine, keep=run.kv_keep),
            notes=notes,
        )
    raise typer.Exit(code)


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


def _command() -> str:
    """What to type to run the same command again."""
    program = Path(sys.argv[0]).name
    start = (
        [program] if program == "headrace" else [sys.executable, "-m", "headrace.cluster.cli.main"]
    )
    return shlex.join([*start, *sys.argv[1:]])


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
