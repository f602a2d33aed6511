"""Options of `headrace prune`."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from headrace.runtime.pruning.choice import Request


class PruneFormat(str, Enum):
    KEEP = "keep"
    BF16 = "bf16"
    INT8 = "int8"
    NF4 = "nf4"


class Method(str, Enum):
    MAGNITUDE = "magnitude"
    WANDA = "wanda"


@dataclass(frozen=True)
class CutOptions:
    """What goes."""

    drop_layers: Annotated[
        str | None,
        typer.Option(help="How many layers go (2: those of least influence), or which (3,7)."),
    ] = None
    mlp_neurons: Annotated[
        str | None, typer.Option(help="The share of MLP neurons that goes, such as 25%.")
    ] = None
    heads: Annotated[
        str | None,
        typer.Option(help="The share of attention heads that goes, in groups that share keys."),
    ] = None
    sparsity: Annotated[
        str | None, typer.Option(help="Weights that become zero: 50%, or 2:4 (two of four stay).")
    ] = None
    method: Annotated[
        Method | None,
        typer.Option(help="What decides which weights become zero. \\[default: wanda]"),
    ] = None

    @property
    def request(self) -> "Request":
        """HeadraceError, naming the option, for what cannot be understood."""
        from headrace.runtime.pruning.choice import parse_request

        return parse_request(
            self.drop_layers,
            self.mlp_neurons,
            self.heads,
            self.sparsity,
            None if self.method is None else self.method.value,
        )


@dataclass(frozen=True)
class TextOptions:
    """What activations are looked at on; `calibration_context` None: windows of up to 1024 tokens."""

    calibrate: Annotated[
        list[Path] | None, typer.Option(help="Text that activations are looked at on. Repeatable.")
    ] = None
    calibration_tokens: Annotated[int, typer.Option(min=2, help="Of each calibration text.")] = (
        16384
    )
    calibration_context: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window of it. \\[default: up to 1024]")
    ] = None
