"""Options of conversions whose weights get different formats."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class MixOptions:
    """Formats by a budget, or as a recipe has them."""

    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|BITS",
            help="Choose formats matrix by matrix, those that change predictions of --calibrate TEXT least: 40GB in "
            "all, or 4.5bits a weight with embeddings and head.",
        ),
    ] = None
    write_recipe: Annotated[
        Path | None, typer.Option(help="Of --budget: write what was chosen, and why (YAML).")
    ] = None
    recipe: Annotated[
        Path | None, typer.Option(help="Formats as in this file, which --write-recipe made.")
    ] = None
