"""Options of commands that run a ring: `headrace generate` and `serve`."""

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Annotated, Any

import typer

ColdOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL[#NAME]",
        help="A cold tier: each node fetches what its store lacks from there. "
        "Where the store was pulled from, if not given.",
    ),
]


class StorageChoice(str, Enum):
    AUTO = "auto"
    DIRECT = "direct"
    BUFFERED = "buffered"
    KVIKIO = "kvikio"


@dataclass(frozen=True)
class RingOptions:
    """Where stages run, how they reach each other and their drives, and how long they are waited for."""

    storage: Annotated[StorageChoice, typer.Option(help="How weights are read.")] = (
        StorageChoice.AUTO
    )
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster to run on. \\[default: one of its own, here]")
    ] = None
    interface: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|NETWORK",
            help="With --address, what stages speak over: an interface that all machines have, such as"
            " eth1, or the one of each that is in a network such as 10.0.0.0/24. \\[default: Ray's]",
        ),
    ] = None
    rendezvous_port: Annotated[
        int,
        typer.Option(
            min=0,
            max=65534,
            help="With --address, where stages find each other on this machine, and with the next port, where"
            " they say that they live. 0 takes free ones.",
        ),
    ] = 0
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Where the Ray cluster of the run's own shows Prometheus its metrics, on all of the"
            " machine's addresses. \\[default: a port that Ray chooses]",
        ),
    ] = None
    cold: ColdOption = None
    from_peers: Annotated[
        bool,
        typer.Option(
            "--from-peers",
            help="With --address: nodes that lack the store, or layers of it, fetch them from nodes of the"
            " cluster that have them.",
        ),
    ] = False
    heartbeat_timeout: Annotated[
        float,
        typer.Option(
            min=1.0, help="Seconds without a sign of life after which a stage is replaced."
        ),
    ] = 30.0
    pass_timeout: Annotated[
        float,
        typer.Option(
            min=1.0, help="Seconds that a pass may take before stages that hold it up are replaced."
        ),
    ] = 600.0

    def chosen(self) -> dict[str, Any]:
        """As EngineOptions has them."""
        given = asdict(self)
        given["storage"] = self.storage.value
        return given
