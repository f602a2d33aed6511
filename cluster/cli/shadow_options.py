"""Options of `headrace serve` for comparing what is answered with a reference."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from headrace.cluster.cli.options import Device
from headrace.cluster.cli.sizes import parse_duration, parse_size
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.serving.shadow.options import ShadowOptions, parse_share
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError


@dataclass(frozen=True)
class ShadowFlags:
    """As they are written; None means not given."""

    shadow: Annotated[
        Path | None,
        typer.Option(
            metavar="REFERENCE",
            help="A checkpoint or a store of the same model: samples of what is answered are compared with it"
            " while the server is idle, and /metrics says how far they are apart.",
        ),
    ] = None
    shadow_sample: Annotated[
        str | None, typer.Option(help="Share of all requests that are sampled; 1% if not given.")
    ] = None
    shadow_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of samples that wait, at most (200000 if not given); more are dropped."
        ),
    ] = None
    shadow_patience: Annotated[
        str | None,
        typer.Option(
            help="How long a sample waits for an idle server, until it is compared in any case; 10min if not given."
        ),
    ] = None
    shadow_memory: Annotated[
        str | None,
        typer.Option(
            help="For two layers of each model, heads and hidden states; 4GiB if not given."
        ),
    ] = None
    shadow_device: Annotated[
        Device | None, typer.Option(help="Where both are computed; cpu if not given.")
    ] = None
    shadow_max_kld: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Mean divergence in nats above which an alert fires; 0.1 if not given."
        ),
    ] = None

    def chosen(self, store: Store, engine: EngineOptions) -> ShadowOptions | None:
        """HeadraceError for values that mean nothing, and for options without --shadow."""
        if self.shadow is None:
            if self != ShadowFlags():
                raise HeadraceError(
                    "--shadow-sample, -tokens, -patience, -memory, -device and -max-kld say how answers are compared"
                    " with a reference: give --shadow REFERENCE with them"
                )
            return None
        from headrace.cluster.hub import local_checkpoint
        from headrace.cluster.run_plan import resolve

        device, dtype = resolve(engine, store)
        given = {
            "sample": None if self.shadow_sample is None else parse_share(self.shadow_sample),
            "tokens": self.shadow_tokens,
            "patience": None
            if self.shadow_patience is None
            else parse_duration(self.shadow_patience),
            "memory": None if self.shadow_memory is None else parse_size(self.shadow_memory),
            "device": self._device(device),
            "max_kld": self.shadow_max_kld,
        }
        return ShadowOptions(
            store=store.path,
            reference=local_checkpoint(self.shadow),
            dtype=dtype,
            context=engine.context,
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )

    def _device(self, ring: str) -> str | None:
        return (
            ring
            if self.shadow_device is Device.AUTO
            else self.shadow_device and self.shadow_device.value
        )
