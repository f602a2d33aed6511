"""Options that `headrace plan`, `generate` and `bench run` share."""

from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from headrace.cluster.adapters import parse_adapters
from headrace.cluster.cli.sizes import parse_duration, parse_size
from headrace.cluster.engine_options import EngineOptions
from headrace.runtime.stage_config import TENANT
from headrace.scheduler.errors import HeadraceError

StoreArgument = Annotated[Path, typer.Argument(help="A store made by `headrace convert`.")]

SIZES = (
    "device_memory",
    "host_memory",
    "kv_host_memory",
    "kv_disk",
    "kv_daily_writes",
    "adapter_host_memory",
)


class Device(str, Enum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class PlacementChoice(str, Enum):
    AUTO = "auto"
    CYCLIC = "cyclic"
    CONTIGUOUS = "contiguous"


class KVFormat(str, Enum):
    AUTO = "auto"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


class Dtype(str, Enum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True)
class RunOptions:
    """The machine that a run may use and how it is to be used. Sizes are texts such as "8GiB"."""

    stages: Annotated[int, typer.Option(min=1, help="Stage processes; on CUDA one GPU each.")] = 1
    device: Annotated[Device, typer.Option(help="Where stages compute.")] = Device.AUTO
    device_memory: Annotated[
        str | None,
        typer.Option(
            help="Per stage, such as 8GiB: weights, ring, KV, scratch. "
            "\\[default: 90% of what is free; CPU: half, shared]"
        ),
    ] = None
    host_memory: Annotated[
        str | None,
        typer.Option(
            help="Per stage, pinned RAM for weights and for KV pages. "
            "\\[default: half of what is free, shared; CPU: what KV pages take]"
        ),
    ] = None
    kv_host_memory: Annotated[
        str,
        typer.Option(
            help="Of a stage's host memory, for KV pages that have to leave its device; where that is "
            "faster, requests go on decoding over them there."
        ),
    ] = "0"
    kv_directory: Annotated[
        Path | None,
        typer.Option(
            help="On NVMe, for KV pages that have to leave host memory, each stage's in a folder of "
            "its own; encrypted, and deleted at the end of the run.",
        ),
    ] = None
    kv_disk: Annotated[
        str | None, typer.Option(help="Per stage, such as 100GiB: most of it in --kv-directory.")
    ] = None
    kv_keep: Annotated[
        bool,
        typer.Option("--kv-keep", help="Leave KV pages in --kv-directory for the next run."),
    ] = False
    kv_key_file: Annotated[
        Path | None,
        typer.Option(help="For --kv-keep: where the keys of KV pages are kept. Made if need be."),
    ] = None
    kv_plaintext: Annotated[
        bool, typer.Option("--kv-plaintext", help="Do not encrypt KV pages in --kv-directory.")
    ] = False
    kv_tenant: Annotated[
        str,
        typer.Option(help="Whose KV pages these are: no other tenant's run uses them."),
    ] = TENANT
    kv_ttl: Annotated[
        str | None,
        typer.Option(help="How long KV pages stay in --kv-directory, such as 90min, 12h or 7d."),
    ] = None
    kv_daily_writes: Annotated[
        str | None,
        typer.Option(help="Per stage, such as 500GB: most bytes a day that KV pages wear a drive."),
    ] = None
    kv_hot_window: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="TOKENS",
            help="Let more sequences decode than host memory holds KV pages of: those older than so "
            "many tokens may lie in --kv-directory and are read for each token, from up to half of "
            "--kv-disk; where that is faster. \\[default: none do]",
        ),
    ] = None
    kv_write_through: Annotated[
        bool,
        typer.Option(
            "--kv-write-through",
            help="Write every KV page to --kv-directory when it is full: where a stage dies, the one in "
            "its place reads them and computes only the rest.",
        ),
    ] = False
    placement: Annotated[PlacementChoice, typer.Option(help="How layers go to stages.")] = (
        PlacementChoice.AUTO
    )
    resident_layers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Layers a stage keeps on its device, of a streamed mixture without their experts; "
            "with 0, experts that pass through are all it has room for. "
            "\\[default: as many as is fastest]",
        ),
    ] = None
    context: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens that a sequence reaches, prompt and output. \\[default: the planner's]",
        ),
    ] = None
    token_budget: Annotated[int | None, typer.Option(min=1, help="Tokens a pass at most.")] = None
    max_sequences: Annotated[int | None, typer.Option(min=1, help="Sequences a pass at most.")] = (
        None
    )
    micro_batches: Annotated[int | None, typer.Option(min=1, help="Micro-batches a pass.")] = None
    dtype: Annotated[Dtype, typer.Option(help="Compute type. auto: the model's; CPU: float32.")] = (
        Dtype.AUTO
    )
    kv_format: Annotated[
        KVFormat, typer.Option(help="Of KV pages once they are full. auto: the compute type.")
    ] = KVFormat.AUTO
    graphs: Annotated[
        bool | None,
        typer.Option(
            "--graphs/--no-graphs",
            help="Launch decodes as CUDA graphs. "
            "\\[default: on CUDA, where they take at most 1/64 of the device memory]",
        ),
    ] = None
    fp8_products: Annotated[
        bool,
        typer.Option(
            "--fp8-products/--no-fp8-products",
            help="Multiply FP8 weights by rows rounded to FP8, where the checkpoint's activations are quantized "
            "and the GPU does it; else dequantize them.",
        ),
    ] = True

    network_gbps: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            help="GB/s between nodes, where stages are on several: 0.0125 for 100 Mbit/s, not measured then. "
            "\\[default: measured]",
        ),
    ] = None
    network_latency: Annotated[
        float, typer.Option(min=0, help="Seconds until a small message is on another node.")
    ] = 3e-4
    ngram_speculation: Annotated[
        str,
        typer.Option(
            metavar="auto|off|N",
            help="Guess tokens from what the prompt and the answer said before, up to N at a time, and "
            "have passes verify them: answers are the same, repetitive ones come faster. auto: where "
            "weights stream and, by the plan, it costs nothing.",
        ),
    ] = "off"

    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="A LoRA adapter as PEFT saves it, for requests that name it; on every stage's node. Repeatable.",
        ),
    ] = None
    adapter_slots: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Adapters on each device at once; others wait in host memory or in their directories. "
            "\\[default: as many as are named, at most 8]",
        ),
    ] = None
    adapter_rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The largest rank that slots have room for. \\[default: that of the adapters named, else 16]",
        ),
    ] = None
    adapter_host_memory: Annotated[
        str | None,
        typer.Option(
            help="Of a stage's host memory, for adapters. \\[default: 256MiB, where there are slots]"
        ),
    ] = None

    def engine(self, store: Path, **more: Any) -> EngineOptions:
        """What the engine takes, with sizes in bytes. HeadraceError for a malformed one."""
        given = asdict(self)
        for name, value in given.items():
            if isinstance(value, Enum):
                given[name] = value.value
        given["adapters"] = parse_adapters(given.pop("adapter") or [])
        return EngineOptions(store=store, **parsed(given), **more)


def parsed(given: dict[str, Any]) -> dict[str, Any]:
    """Options of the engine, with sizes in bytes and times in seconds where they are texts."""
    given = dict(given)
    for name in SIZES:
        if isinstance(given.get(name), str):
            given[name] = parse_size(given[name])
    if isinstance(given.get("kv_ttl"), str):
        given["kv_ttl"] = parse_duration(given["kv_ttl"])
    if "ngram_speculation" in given:
        given["ngram_speculation"] = parse_speculation(given["ngram_speculation"])
    if given.get("kv_disk", 0) is None:
        del given["kv_disk"]
    return given


MOST_SPECULATION = 32


def parse_speculation(given: str | int | None) -> int | None:
    """Guessed tokens at a time; None leaves it to the planner."""
    text = "auto" if given is None else str(given)
    if text in ("auto", "off"):
        return None if text == "auto" else 0
    if text.isdecimal() and int(text) <= MOST_SPECULATION:
        return int(text)
    raise HeadraceError(
        f"--ngram-speculation must be auto, off or how many tokens to guess (1 to {MOST_SPECULATION}),"
        f" not {text!r}"
    )
