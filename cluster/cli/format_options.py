"""Options of conversions: which formats weights get."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Format(str, Enum):
    KEEP = "keep"
    BF16 = "bf16"
    INT8 = "int8"
    NF4 = "nf4"
    INT4 = "int4"
    INT3 = "int3"


@dataclass(frozen=True)
class FormatOptions:
    """Formats by name; None where nothing was said."""

    format: Annotated[
        Format | None, typer.Option(help="Of the layers' matrices. \\[default: nf4]")
    ] = None
    policy: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=FORMAT for tensors by name; the first match wins. Repeatable."),
    ] = None
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="Quantize NF4's scales, too.")
    ] = False
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Columns that share a scale in int4 and int3: 32, 64 (if not given) or 128."
        ),
    ] = None
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Change what is quantized already; say what it changed."),
    ] = False

    def used(self) -> dict[str, bool]:
        """Options that say which weights get which format."""
        return {
            "--format": self.format is not None,
            "--policy": bool(self.policy),
            "--double-quant": self.double_quant,
        }


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
