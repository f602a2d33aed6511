"""`headrace eval`: what compression costs, in figures, and whether that is too much."""

from pathlib import Path
from typing import Annotated

import typer

from headrace.cluster.cli.evaluate_options import CorpusOptions
from headrace.cluster.cli.option_groups import takes_options


@takes_options
def evaluate_stores(
    corpus: CorpusOptions,
    stores: Annotated[list[Path], typer.Argument(help="Stores, or checkpoints, of one model.")],
    reference: Annotated[
        Path | None,
        typer.Option(help="The checkpoint that they were made from, or a store of it."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures there.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one page with plots there.")] = None,
    gate: Annotated[
        Path | None, typer.Option(help="Thresholds (YAML); crossing one ends with code 3.")
    ] = None,
) -> None:
    """Compare stores with what they were made from: perplexity, KL divergence, agreement.

    Every model is read once, layer by layer, for all texts, so that a small device is enough; greedy continuations
    take up to --new-tokens more readings (--prompts 0 leaves them out).
    """
    from rich.console import Console

    from headrace.cluster.cli.evaluate import Outputs, run_eval

    code = run_eval(Console(), stores, reference, corpus, Outputs(json, html, gate))
    raise typer.Exit(code)
