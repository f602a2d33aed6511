"""Options of `headrace eval`, some of which commands with a --gate share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from headrace.cluster.cli.options import Device, Dtype
from headrace.cluster.cli.sizes import parse_size
from headrace.scheduler.errors import HeadraceError


@dataclass(frozen=True)
class CorpusOptions:
    """Over which texts, and where. Sizes are texts such as "8GiB"."""

    text: Annotated[
        list[Path] | None, typer.Option(help="Plain text to predict, UTF-8. Repeatable.")
    ] = None
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a window. \\[default: 1024, or the model's]"),
    ] = None
    tokens: Annotated[int, typer.Option(min=2, help="Of each text, at most.")] = 16384
    device: Annotated[Device, typer.Option(help="Where layers compute.")] = Device.AUTO
    device_memory: Annotated[
        str | None,
        typer.Option(
            help="For two layers of each model, heads and a micro-batch, such as 8GiB. "
            "\\[default: 90% of what is free; CPU: what micro-batches of 2048 tokens take]"
        ),
    ] = None
    dtype: Annotated[
        Dtype, typer.Option(help="Compute type. auto: the reference's; CPU: float32.")
    ] = Dtype.AUTO
    prompts: Annotated[
        int, typer.Option(min=0, help="Greedy continuations to compare; each takes more sweeps.")
    ] = 8
    new_tokens: Annotated[int, typer.Option(min=1, help="Of each continuation.")] = 32

    @property
    def memory_bytes(self) -> int | None:
        """HeadraceError for a malformed size."""
        return None if self.device_memory is None else parse_size(self.device_memory)

    def refuse_without_gate(self, *, calibrating: bool) -> None:
        """HeadraceError when a conversion is told what only a gate, or one that calibrates, needs."""
        shared = CorpusOptions(device=self.device, device_memory=self.device_memory)
        if self != (shared if calibrating else CorpusOptions()):
            raise HeadraceError(
                "--text, --context, --tokens, --device, --device-memory, --dtype, --prompts and --new-tokens say how a "
                "conversion is judged: give --gate FILE with them (--device and --device-memory: or --calibrate TEXT)"
            )


@dataclass(frozen=True)
class OutputOptions:
    """Files to write, and one with thresholds."""

    json: Annotated[Path | None, typer.Option(help="Write all figures there.")] = None
    html: Annotated[Path | None, typer.Option(help="Write one page with plots there.")] = None
    gate: Annotated[
        Path | None, typer.Option(help="Thresholds (YAML); crossing one ends with code 3.")
    ] = None
