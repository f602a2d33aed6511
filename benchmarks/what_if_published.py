"""What the planner expects of an H200 beside what was measured on one: the rows of docs/benchmarks.md.

    python benchmarks/what_if_published.py

Needs no GPU: sizes come from the shapes, speeds are those that docs/benchmarks.md gives beside each row (4,150 GB/s of
device memory and 706 TFLOP/s where it gives none), and what was measured is copied from there.
"""

import statistics
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from headrace.cluster.bench.hollow import hollow_store
from headrace.cluster.bench.run import Work
from headrace.cluster.bench.shapes import config_of
from headrace.cluster.whatif.hardware import Node, Pool
from headrace.cluster.whatif.inputs import plan_inputs
from headrace.runtime.shape import model_shape
from headrace.scheduler.expectation import plan_seconds
from headrace.scheduler.inputs import Choices, ModelShape, Workload

GB, GIB = 10**9, 1 << 30


@dataclass(frozen=True, slots=True)
class Row:
    """`measured` seconds of a round of `batch` sequences, with a link and a drive of so many GB/s."""

    name: str
    shape: str
    measured: float
    batch: int
    prompt: int
    new: int
    device: int
    host: int
    layers: int | None = None
    fmt: str = "nf4"
    gpus: int = 1
    placement: str = "auto"
    resident: int | None = None
    tokens: int | None = None
    link: float = 55.2
    drive: float = 2.0
    kv_host: int = 0


ROWS = (
    Row("70b x 20, host RAM, 1 GPU", "70b", 0.177, 256, 256, 16, 30 * GIB, 10 * GB, 20, resident=0,
        tokens=8192),
    Row("70b x 20, host RAM, 2 GPUs, cyclic", "70b", 0.0937, 256, 128, 24, 60 * GIB, 10 * GB, 20,
        gpus=2, placement="cyclic", resident=0, tokens=16384, link=53.6),
    Row("70b x 20, host RAM, 2 GPUs, contiguous", "70b", 0.179, 256, 128, 24, 60 * GIB, 10 * GB, 20,
        gpus=2, placement="contiguous", resident=0, tokens=16384, link=53.4),
    Row("the same, cyclic, 1,024 sequences", "70b", 0.0978, 1024, 64, 48, 60 * GIB, 10 * GB, 20, gpus=2,
        placement="cyclic", resident=0, tokens=16384, link=55.0),
    Row("70b in 24 GiB and 32 GB of host RAM", "70b", 0.414, 64, 64, 8, 24 * GIB, 32 * GB, link=55.0),
    Row("70b in 24 GiB, the rest from NVMe", "70b", 12.4, 64, 64, 4, 24 * GIB, 0, link=55.0, drive=2.02),
    Row("70b x 20 from NVMe", "70b", 5.52, 256, 64, 7, 60 * GIB, 0, 20, resident=0, tokens=16384,
        drive=1.92),
    Row("70b x 20, KV pages in host RAM", "70b", 0.660, 604, 512, 60, 12 * GIB, 10 * GB + 27 * GIB, 20,
        resident=0, tokens=8192, link=55.1, kv_host=27 * GIB),
    Row("8b, NF4, resident, 128 sequences", "8b", 0.00872, 128, 240, 32, 120 * GIB, 0, resident=32),
    Row("8b, NF4, resident, 1 sequence", "8b", 0.00453, 1, 240, 32, 120 * GIB, 0, resident=32),
    Row("8b, bf16, resident, 128 sequences", "8b", 0.00871, 128, 240, 32, 120 * GIB, 0, fmt="bf16",
        resident=32),
    Row("mixtral-8x7b, host RAM, 4 sequences", "mixtral-8x7b", 0.126, 4, 128, 24, 12 * GIB, 30 * GB,
        resident=0),
)  # fmt: skip


def shape_of(row: Row) -> ModelShape:
    return model_shape(hollow_store(config_of(row.shape, row.layers), row.fmt), "bfloat16")


def expected(row: Row, shape: ModelShape) -> tuple[float, str]:
    """Seconds of a round, and what binds it."""
    figures = {"gpu_memory": 141 * GB, "hbm_gbps": 4150, "tflops": 706, "pcie_gbps": row.link}
    node = Node.model_validate(
        {**figures, "measured": True, "gpus": row.gpus, "host_memory": 0, "drive_gbps": row.drive}
    )
    work = Work(row.batch, row.prompt, row.new)
    groups = row.gpus if row.placement == "contiguous" else 1
    choices = Choices(
        placement=row.placement,
        token_budget=row.tokens,
        resident_layers=row.resident,
        max_sequences=-(-row.batch // groups),
        stage_layers=None if row.gpus == 1 else (shape.num_layers // 2,) * 2,
        drafts=0,
    )
    inputs = plan_inputs(
        Pool(name=row.name, nodes=[node]),
        shape,
        Workload(context=work.context, min_sequences=row.batch),
        choices,
        device_memory=row.device,
        host_memory=row.host,
        kv_host_memory=row.kv_host,
    )
    plan = replace(inputs, choices=choices).plan()
    seconds = plan_seconds(
        plan, shape, inputs.profiles, inputs.links, row.batch, row.prompt + row.new // 2
    )
    return seconds, plan.prediction.bound_by


def main() -> None:
    table = Table(title="One H200, or two", title_justify="left")
    for name in ("row", "bound by", "expected, s", "measured, s", "off by"):
        table.add_column(name, justify="left" if name in ("row", "bound by") else "right")
    shapes: dict[tuple[str, int | None, str], ModelShape] = {}
    errors = []
    for row in ROWS:
        key = (row.shape, row.layers, row.fmt)
        if key not in shapes:
            shapes[key] = shape_of(row)
        seconds, bound_by = expected(row, shapes[key])
        errors.append(seconds / row.measured - 1.0)
        table.add_row(
            row.name, bound_by, f"{seconds:.4g}", f"{row.measured:.4g}", f"{errors[-1]:+.0%}"
        )
    console = Console(width=100)
    console.print(table)
    console.print(f"median error {statistics.median(map(abs, errors)):.1%}")


if __name__ == "__main__":
    main()
