"""`headrace eval`: what compression costs, in figures, and whether that is too much."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from headrace.cluster.cli.evaluate_options import CorpusOptions, OutputOptions
from headrace.cluster.cli.option_groups import takes_options


@takes_options
def evaluate_stores(
    stores: Annotated[list[Path], typer.Argument(help="Stores, or checkpoints, of one model.")],
    *,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="The checkpoint that they were made from (a path, or a name on the Hub), or a store of it."
        ),
    ] = None,
    outputs: OutputOptions,
    corpus: CorpusOptions,
) -> None:
    """Compare stores with what they were made from: perplexity, KL divergence, agreement.

    Every model is read once, layer by layer, for all texts, so that a small device is enough; greedy continuations
    take up to --new-tokens more readings (--prompts 0 leaves them out).
    """
    from headrace.cluster.cli.evaluate import run_eval
    from headrace.cluster.hub import local_checkpoint

    reference = None if reference is None else local_checkpoint(reference)
    stores = [local_checkpoint(store) for store in stores]
    raise typer.Exit(run_eval(Console(), stores, reference, corpus, outputs))
