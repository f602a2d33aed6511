"""`headrace bench`: what this machine can do, and what a model's shape reaches on it."""

import json as json_module
import os
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cluster.cli.option_groups import takes_options
from headrace.cluster.cli.options import Device, RunOptions
from headrace.cluster.cli.ring_options import StorageChoice
from headrace.cluster.cli.sizes import parse_size
from headrace.scheduler.errors import HeadraceError

app = typer.Typer(
    help="Measure this machine, and what a model's shape reaches on it.", no_args_is_help=True
)


class WeightFormat(str, Enum):
    NF4 = "nf4"
    INT8 = "int8"
    INT4 = "int4"
    BF16 = "bf16"


class TierChoice(str, Enum):
    AUTO = "auto"
    DEVICE = "device"
    HOST = "host"
    NVME = "nvme"


DirectoryOption = Annotated[
    Path | None,
    typer.Option(help="On the drive to measure. \\[default: $TMPDIR]", show_default=False),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write everything here, too.")]


def check_writable(file: Path | None) -> None:
    """HeadraceError now rather than after minutes of measuring."""
    if file is not None and not os.access(file.parent, os.W_OK):
        raise HeadraceError(f"--json {file}: {file.parent} is not a directory to write to")


@app.command("run")
@takes_options
def run_shape(
    run: RunOptions,
    shape: Annotated[
        str,
        typer.Argument(
            help="1b, 8b, 70b, 405b, qwen3-30b, qwen3-235b, mixtral-8x7b or deepseek-v3."
        ),
    ] = "8b",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Its first layers. \\[default: all]")
    ] = None,
    format: Annotated[WeightFormat, typer.Option(help="Of the layers.")] = WeightFormat.NF4,
    tier: Annotated[
        TierChoice,
        typer.Option(help="Where streamed layers rest; device: all stay. auto: as generate does."),
    ] = TierChoice.AUTO,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences at once. \\[default: what fits, 256 at most]"),
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    new: Annotated[int, typer.Option(min=2, help="Tokens generated after it.")] = 32,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE, another value in config.json. Repeatable."),
    ] = None,
    directory: DirectoryOption = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the store there and use it again.")
    ] = False,
    storage: Annotated[
        StorageChoice, typer.Option(help="How weights are read.")
    ] = StorageChoice.AUTO,
    local: Annotated[
        bool, typer.Option("--local", help="One stage in this process, without Ray.")
    ] = False,
    profile: Annotated[
        Path | None,
        typer.Option(help="Instead, trace two decode passes into this file; implies --local."),
    ] = None,
    cap_host_memory: Annotated[
        str | None,
        typer.Option(help="Of this command, page cache included, such as 16GiB. Needs root."),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Run a model's shape with random weights; print what was reached and what bound it.

    Weights go to a temporary store on the drive. A pass counts when all sequences decode; times are
    medians. Bounds come from bandwidths measured in the same run, and from the bytes that its tokens
    needed: random weights send most tokens to the same few experts of a mixture, real ones may not.
    """
    from headrace.cluster.bench.memory_cap import host_memory_cap
    from headrace.cluster.bench.run import (
        Work,
        check_request,
        random_store,
        run_profile,
        run_work,
    )
    from headrace.cluster.bench.shapes import config_of
    from headrace.cluster.cli.bench_tables import profile_table, run_json, run_title, run_view

    check_writable(json)
    config = config_of(shape, layers, setting or ())
    work = Work(batch, prompt, new, tier.value, local or profile is not None)
    options = run.engine(Path(), storage=storage.value)
    folder = directory or Path(tempfile.gettempdir())
    check_request(options, work, folder)
    console = Console()
    in_memory = work.tier == "host" and options.host_memory is None
    with (
        host_memory_cap(None if cap_host_memory is None else parse_size(cap_host_memory)),
        console.status(f"writing {shape} to {folder} ...") as status,
        random_store(folder, config, format.value, in_memory=in_memory, keep=keep) as store,
    ):
        status.update("measuring and running ...")
        title = run_title(shape, config, format.value, options.device)
        if profile is not None:
            console.print(profile_table(title, run_profile(options, work, store, profile)))
            return
        result = run_work(options, work, store)
    console.print(run_view(title, work, result))
    if json is not None:
        described = run_json(shape, config, format.value, work, result)
        json.write_text(json_module.dumps(described, indent=1))


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
    folder = directory or Path(tempfile.gettempdir())
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
