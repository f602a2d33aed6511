"""`headrace prune` as typer sees it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cluster.cli.evaluate_options import CorpusOptions
from headrace.cluster.cli.option_groups import takes_options
from headrace.cluster.cli.prune_options import CutOptions, PruneFormat, TextOptions


@takes_options
def prune_model(
    source: Annotated[
        Path,
        typer.Argument(
            help="A Hugging Face checkpoint (a path, or a name on the Hub), or a store."
        ),
    ],
    dest: Annotated[Path, typer.Argument(help="The directory to write the smaller store to.")],
    cut: CutOptions,
    *,
    format: Annotated[
        PruneFormat, typer.Option(help="Of the layers' matrices, as of `headrace convert`.")
    ] = PruneFormat.KEEP,
    texts: TextOptions,
    gate: Annotated[
        Path | None,
        typer.Option(help="Thresholds (YAML) of `headrace eval`; crossing one ends with code 3."),
    ] = None,
    allow_missing_tokenizer: Annotated[
        bool, typer.Option("--allow-missing-tokenizer", help="Prune without a tokenizer.")
    ] = False,
    corpus: CorpusOptions,
) -> None:
    """Write a smaller store: without the layers, neurons or heads that matter least, or with zeros.

    Run it again to resume. Stores in the model's own type, int8 or nf4 open in transformers. With --text, the result
    is compared with SOURCE as `headrace eval` does.
    """
    from headrace.cluster.cli.prune import run_prune
    from headrace.cluster.hub import local_checkpoint

    code = run_prune(
        Console(),
        local_checkpoint(source),
        dest,
        cut.request,
        texts,
        corpus,
        format=format.value,
        gate=gate,
        allow_missing_tokenizer=allow_missing_tokenizer,
    )
    raise typer.Exit(code)
