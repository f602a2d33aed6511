"""`headrace prune` as typer sees it."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cluster.cli.evaluate_options import CorpusOptions
from headrace.cluster.cli.option_groups import takes_options


class PruneFormat(str, Enum):
    KEEP = "keep"
    BF16 = "bf16"
    INT8 = "int8"
    NF4 = "nf4"


class Method(str, Enum):
    MAGNITUDE = "magnitude"
    WANDA = "wanda"


@takes_options
def prune_model(
    corpus: CorpusOptions,
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
        typer.Option(help="What decides which weights become zero. \\[default: wanda]"),
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
        int | None, typer.Option(min=2, help="Tokens of a window of it. \\[default: up to 1024]")
    ] = None,
    gate: Annotated[
        Path | None,
        typer.Option(help="Thresholds (YAML) of `headrace eval`; crossing one ends with code 3."),
    ] = None,
    allow_missing_tokenizer: Annotated[
        bool, typer.Option("--allow-missing-tokenizer", help="Prune without a tokenizer.")
    ] = False,
) -> None:
    """Write a smaller store: without the layers, neurons or heads that matter least, or with zeros.

    Run it again to resume. Stores in the model's own type, int8 or nf4 open in transformers. With --text, the result
    is compared with SOURCE as `headrace eval` does.
    """
    from headrace.cluster.cli.prune import Calibrating, run_prune
    from headrace.runtime.pruning.choice import parse_request

    code = run_prune(
        Console(),
        source,
        dest,
        parse_request(
            drop_layers, mlp_neurons, heads, sparsity, None if method is None else method.value
        ),
        Calibrating(tuple(calibrate or ()), calibration_tokens, calibration_context),
        corpus,
        format=format.value,
        gate=gate,
        allow_missing_tokenizer=allow_missing_tokenizer,
    )
    raise typer.Exit(code)
