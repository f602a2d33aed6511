"""`headrace generate` as typer sees it."""

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cluster.cli.option_groups import takes_options
from headrace.cluster.cli.options import RunOptions, StoreArgument
from headrace.cluster.cli.ring_options import RingOptions
from headrace.scheduler.errors import HeadraceError


@dataclass(frozen=True)
class RowDefaults:
    """What rows get that do not say, by the names of SamplingParams."""

    max_tokens: Annotated[int, typer.Option(min=1, help="Default for rows without it.")] = 256
    temperature: Annotated[float, typer.Option(help="Default for rows without it.")] = 1.0
    top_p: Annotated[float, typer.Option(help="Default for rows without it.")] = 1.0
    top_k: Annotated[int, typer.Option(help="Default for rows without it.")] = 0
    seed: Annotated[int | None, typer.Option(help="Changes every row's random numbers.")] = None


@takes_options
def generate_rows(
    store: StoreArgument,
    input: Annotated[Path, typer.Option(help="Rows: JSON lines, OpenAI Batch or Parquet.")],
    output: Annotated[Path, typer.Option(help="JSON lines; appended to as rows finish.")],
    defaults: RowDefaults,
    *,
    default_adapter: Annotated[
        str | None, typer.Option(help="Of --adapter, the one of rows that name none.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write what every stage did in its newest 64 passes, for ui.perfetto.dev."
        ),
    ] = None,
    run: RunOptions,
    ring: RingOptions,
) -> None:
    """Run a batch job. Run the same command again to resume it; finished rows are never repeated."""
    from headrace.cluster.adapters import check_adapter_options, opened_adapters
    from headrace.cluster.cli.generate import Setting, run_job
    from headrace.cluster.cli.kv_report import end_of_pages
    from headrace.cluster.cli.opened import opened_store
    from headrace.cluster.explain.report import ReportWriter
    from headrace.cluster.job_files import JobAdapters, JobFiles
    from headrace.cluster.jobs import Job
    from headrace.cluster.launch import running_engine
    from headrace.cluster.run_plan import kv_alternatives
    from headrace.scheduler.request import SamplingParams

    if trace is not None and trace.resolve() == output.resolve():
        raise HeadraceError(f"--trace {trace} is the --output: choose another --trace")
    options = run.engine(store, **ring.chosen(), trace=trace)
    params = SamplingParams(**asdict(defaults))
    opened = opened_store(store, ring.cold)
    check_adapter_options(options)
    adapters = JobAdapters.of(opened_adapters(options), default_adapter)
    # The files first: starting the engine takes long, and a mistake in a path should not.
    with (
        JobFiles(input, output, opened.digest, params, adapters) as files,
        running_engine(options) as engine,
    ):
        others = kv_alternatives(options, opened)
        code = run_job(
            Job(engine, engine.tokenizer, files, model_name=store.name),
            lambda: Setting(engine.plan, opened.nbytes, options.device_memory),
            Console(),
            resume_command=_command(),
            trace=engine.trace,
            kv=lambda: end_of_pages(engine, keep=run.kv_keep),
            notes=ReportWriter(output, store.name, engine, others),
        )
    raise typer.Exit(code)


def _command() -> str:
    """What to type to run the same command again."""
    program = Path(sys.argv[0]).name
    start = (
        [program] if program == "headrace" else [sys.executable, "-m", "headrace.cluster.cli.main"]
    )
    return shlex.join([*start, *sys.argv[1:]])
