"""`headrace bench`: what this machine can do, and what a model's shape reaches on it."""

import json as json_module
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cluster.cli.bench_options import (
    DirectoryOption,
    JsonOption,
    ShapeOptions,
    folder_of,
)
from headrace.cluster.cli.option_groups import takes_options
from headrace.cluster.cli.options import Device, RunOptions
from headrace.cluster.cli.sizes import parse_size
from headrace.scheduler.errors import HeadraceError

app = typer.Typer(
    help="Measure this machine, and what a model's shape reaches on it.", no_args_is_help=True
)


def check_writable(file: Path | None) -> None:
    """HeadraceError now rather than after minutes of measuring."""
    if file is not None and not os.access(file.parent, os.W_OK):
        raise HeadraceError(f"--json {file}: {file.parent} is not a directory to write to")


@app.command("run")
@takes_options
def run_shape(
    shape: Annotated[
        str,
        typer.Argument(
            help="1b, 8b, 70b, 405b, qwen3-30b, qwen3-235b, mixtral-8x7b or deepseek-v3."
        ),
    ] = "8b",
    *,
    options: ShapeOptions,
    run: RunOptions,
) -> None:
    """Run a model's shape with random weights; print what was reached and what bound it.

    Weights go to a temporary store on the drive. A pass counts when all sequences decode; times are
    medians. Bounds come from bandwidths measured in the same run, and from the bytes that its tokens
    needed: random weights send most tokens to the same few experts of a mixture, real ones may not.
    """
    from headrace.cluster.bench.memory_cap import host_memory_cap
    from headrace.cluster.bench.run import check_request, random_store, run_profile, run_work
    from headrace.cluster.cli.bench_tables import profile_table, run_json, run_title, run_view

    check_writable(options.json)
    config, fmt = options.config(shape), options.format.value
    work, folder, keep = options.work, options.folder, options.keep
    engine = run.engine(Path(), storage=options.storage.value)
    check_request(engine, work, folder)
    console = Console()
    in_memory = work.tier == "host" and engine.host_memory is None
    with (
        host_memory_cap(options.cap),
        console.status(f"writing {shape} to {folder} ...") as status,
        random_store(folder, config, fmt, in_memory=in_memory, keep=keep) as store,
    ):
        status.update("measuring and running ...")
        title = run_title(shape, config, fmt, engine.device)
        if options.profile is not None:
            found = run_profile(engine, work, store, options.profile)
            console.print(profile_table(title, found))
            return
        result = run_work(engine, work, store)
    console.print(run_view(title, work, result))
    if options.json is not None:
        described = run_json(shape, config, fmt, work, result)
        options.json.write_text(json_module.dumps(described, indent=1))


@app.command("io")
def measure(
    directory: DirectoryOption = None,
    device: Annotated[Device, typer.Option(help="What to measure.")] = Device.AUTO,
    size: Annotated[str, typer.Option(help="Of the files to read.")] = "2GiB",
    json: JsonOption = None,
) -> None:
    """Measure the drive, the links to the GPUs, their memory and arithmetic, hops and Ray calls."""
    from headrace.cluster.bench.machine import measure_machine
    from headrace.cluster.cli.bench_tables import machine_json, machine_table
    from headrace.cluster.run_plan import resolve_device

    check_writable(json)
    folder = folder_of(directory)
    console = Console()
    readings = []
    where, nbytes = resolve_device(device.value), parse_size(size)
    with console.status("measuring ...") as status:
        for reading in measure_machine(folder, where, nbytes):
            readings.append(reading)
            status.update(f"measured {reading.what}, {reading.where} ...")
    console.print(machine_table(folder, where, readings))
    if json is not None:
        json.write_text(json_module.dumps(machine_json(folder, where, readings), indent=1))
