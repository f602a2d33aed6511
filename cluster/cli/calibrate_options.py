"""Options of calibrated conversions."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Method(str, Enum):
    GPTQ = "gptq"
    AWQ = "awq"
    NEAREST = "nearest"


@dataclass(frozen=True)
class CalibrationOptions:
    """How a conversion's roundings are to follow a text."""

    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT", help="Round matrices by what they are given when this text is read."
        ),
    ] = None
    method: Annotated[
        Method,
        typer.Option(
            help="Of --calibrate: errors made up for, or channels scaled; nearest: of --budget, the text decides "
            "formats only."
        ),
    ] = Method.GPTQ
    calibration_tokens: Annotated[int, typer.Option(min=1, help="At most, of the text.")] = 262144
    calibration_context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a sequence. \\[default: 2048, or the model's]"),
    ] = None
