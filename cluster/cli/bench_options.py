"""Options of `headrace bench run`, and those that it shares."""

import tempfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cluster.cli.ring_options import StorageChoice
from headrace.cluster.cli.sizes import parse_size

if TYPE_CHECKING:
    from headrace.cluster.bench.run import Work


class WeightFormat(str, Enum):
    NF4 = "nf4"
    INT8 = "int8"
    INT4 = "int4"
    BF16 = "bf16"


class TierChoice(str, Enum):
    AUTO = "auto"
    DEVICE = "device"
    HOST = "host"
    NVME = "nvme"


DirectoryOption = Annotated[
    Path | None,
    typer.Option(help="On the drive to measure. \\[default: $TMPDIR]", show_default=False),
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write everything here, too.")]


def folder_of(directory: Path | None) -> Path:
    """Where --directory is, or else temporary files are."""
    return directory or Path(tempfile.gettempdir())


@dataclass(frozen=True)
class ShapeOptions:
    """What is run of a model's shape, and what of that is kept."""

    layers: Annotated[
        int | None, typer.Option(min=1, help="Its first layers. \\[default: all]")
    ] = None
    format: Annotated[WeightFormat, typer.Option(help="Of the layers.")] = WeightFormat.NF4
    tier: Annotated[
        TierChoice,
        typer.Option(help="Where streamed layers rest; device: all stay. auto: as generate does."),
    ] = TierChoice.AUTO
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences at once. \\[default: what fits, 256 at most]"),
    ] = None
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128
    new: Annotated[int, typer.Option(min=2, help="Tokens generated after it.")] = 32
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE, another value in config.json. Repeatable."),
    ] = None
    directory: DirectoryOption = None
    keep: Annotated[bool, typer.Option("--keep", help="Keep the store there and use it again.")] = (
        False
    )
    storage: Annotated[StorageChoice, typer.Option(help="How weights are read.")] = (
        StorageChoice.AUTO
    )
    local: Annotated[
        bool, typer.Option("--local", help="One stage in this process, without Ray.")
    ] = False
    profile: Annotated[
        Path | None,
        typer.Option(help="Instead, trace two decode passes into this file; implies --local."),
    ] = None
    cap_host_memory: Annotated[
        str | None,
        typer.Option(help="Of this command, page cache included, such as 16GiB. Needs root."),
    ] = None
    json: JsonOption = None

    def config(self, shape: str) -> dict[str, Any]:
        """The shape's config.json. HeadraceError for one that is not known."""
        from headrace.cluster.bench.shapes import config_of

        return config_of(shape, self.layers, self.setting or ())

    @property
    def work(self) -> "Work":
        from headrace.cluster.bench.run import Work

        local = self.local or self.profile is not None
        return Work(self.batch, self.prompt, self.new, self.tier.value, local)

    @property
    def folder(self) -> Path:
        return folder_of(self.directory)

    @property
    def cap(self) -> int | None:
        """Bytes. HeadraceError for a malformed size."""
        return None if self.cap_host_memory is None else parse_size(self.cap_host_memory)
