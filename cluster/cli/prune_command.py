"""`headrace prune` as typer sees it."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cluster.cli.options import Device
from headrace.cluster.cli.sizes import parse_size


class PruneFormat(str, Enum):
    KEEP = "keep"
    BF16 = "bf16"
    INT8 = "int8"
    NF4 = "nf4"


class Method(str, Enum):
    MAGNITUDE = "magnitude"
    WANDA = "wanda"


def prune_model(
    source: Annotated[Path, typer.Argument(help="A local Hugging Face checkpoint, or a store.")],
    dest: Annotated[Path, typer.Argument(help="The directory to write the smaller store to.")],
    drop_layers: Annotated[
        str | None,
        typer.Option(help="How many layers go (2: those of least influence), or which (3,7)."),
    ] = None,
    mlp_neurons: Annotated[
        str | None, typer.Option(help="The share of MLP neurons that goes, such as 25%.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="The share of attention heads that goes, in groups that share keys."),
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Weights that become zero: 50%, or 2:4 (two of four stay).")
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(help="What decides which weights become zero. [default: wanda]"),
    ] = None,
    format: Annotated[
        PruneFormat, typer.Option(help="Of the layers' matrices, as of `headrace convert`.")
    ] = PruneFormat.KEEP,
    calibrate: Annotated[
        list[Path] | None, typer.Option(help="Text that activations are looked at on. Repeatable.")
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(min=2, help="Of each calibration text.")
    ] = 16384,
    calibration_context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window of it. [default: up to 1024]")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Other text, for the perplexity before and after. Repeatable."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of each of these texts.")] = 16384,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window of them. [default: up to 1024]")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where the model runs on texts.")] = Device.AUTO,
    device_memory: Annotated[
        str | None, typer.Option(help="For that, such as 8GiB. [default: what it takes]")
    ] = None,
    allow_missing_tokenizer: Annotated[
        bool, typer.Option("--allow-missing-tokenizer", help="Prune without a tokenizer.")
    ] = False,
) -> None:
    """Write a smaller store: without the layers, neurons or heads that matter least, or with zeros.

    Run it again to resume. A store that keeps its type opens in transformers, as do those in int8 and nf4.
    """
    from headrace.cluster.cli.prune import PruneOptions, run_prune
    from headrace.runtime.pruning.choice import parse_request

    request = parse_request(
        drop_layers, mlp_neurons, heads, sparsity, None if method is None else method.value
    )
    options = PruneOptions(
        format=format.value,
        calibrate=tuple(calibrate or ()),
        calibration_tokens=calibration_tokens,
        calibration_context=calibration_context,
        text=tuple(text or ()),
        tokens=tokens,
        context=context,
        device=device.value,
        device_memory=None if device_memory is None else parse_size(device_memory),
        allow_missing_tokenizer=allow_missing_tokenizer,
    )
    run_prune(Console(), source, dest, request, options)
