"""How far runs are from what the planner expects of them: real runs of some configurations on this CPU.

    python benchmarks/what_if.py [--directory DIR] [--repeats 3] [--only NAME ...]

Each run probes the machine anew, plans, and decodes; what it took a round is compared with the simulation of
that plan, of the same sequences at the same context. Configurations take turns, so that what else the
machine does meets them all; the row is the run of the median error. Drives are slowed by a cgroup (blkio), which limits this
process and its children, or not at all where no cgroup can be made: those rows are left out then, and it says so.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headrace.cluster.bench.driver import Driver, random_prompts, steady
from headrace.cluster.bench.local import local_engine
from headrace.cluster.bench.random_store import write_store
from headrace.cluster.bench.run import Work, options_of
from headrace.cluster.bench.shapes import SHAPES
from headrace.cluster.engine import Engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.launch import running_engine
from headrace.runtime.store import Store
from headrace.scheduler.expectation import plan_seconds

BLKIO = Path("/sys/fs/cgroup/blkio")
MIB = 1 << 20
WARMUP_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Case:
    """`limit` GB/s of the drive; None: as it is. `more` are options of the engine."""

    name: str
    tier: str
    batch: int
    prompt: int
    new: int
    stages: int = 1
    limit: float | None = None
    more: tuple[tuple[str, Any], ...] = ()


CASES = (
    Case("resident, 1 sequence", "device", 1, 32, 24),
    Case("resident, 16 sequences", "device", 16, 32, 24),
    Case("resident, 8 at a context of 900", "device", 8, 880, 24),
    Case("host RAM, 4 sequences", "host", 4, 32, 16),
    Case("drive at 0.2 GB/s, 8 sequences", "nvme", 8, 32, 8, limit=0.2),
    Case("drive at 0.4 GB/s, 8 sequences", "nvme", 8, 32, 12, limit=0.4),
    Case("drive at 0.4 GB/s, 64 sequences", "nvme", 64, 32, 8, limit=0.4),
    Case("half resident, drive at 0.2 GB/s", "nvme", 8, 32, 10, limit=0.2,
         more=(("resident_layers", 6),)),
    Case("2 stages, resident, 16 sequences", "device", 16, 32, 24, stages=2),
    Case("2 cyclic stages, drive at 0.2 GB/s", "nvme", 8, 32, 10, stages=2, limit=0.2,
         more=(("placement", "cyclic"),)),
)  # fmt: skip

CONFIG: dict[str, Any] = SHAPES["8b"] | {
    "num_hidden_layers": 12,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds of a round, and what was planned from."""

    expected: float
    measured: float
    bound: float
    bound_by: str
    drive_gbps: float

    @property
    def error(self) -> float:
        return self.expected / self.measured - 1.0


@contextmanager
def slow_drive(gbps: float | None, directory: Path) -> Iterator[None]:
    """This process and those it starts read no faster from the drive of `directory`. OSError where no cgroup
    can be made."""
    if gbps is None:
        yield
        return
    device = os.stat(directory).st_dev
    own = next(
        line.split(":", 2)[2]
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if "blkio" in line.split(":")[1].split(",")
    )
    parent, group = BLKIO / own.strip("/"), BLKIO / f"headrace-what-if-{os.getpid()}"
    group.mkdir()
    try:
        limit = f"{os.major(device)}:{os.minor(device) & ~15} {round(gbps * 1e9)}"
        (group / "blkio.throttle.read_bps_device").write_text(limit)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        for process in (group / "cgroup.procs").read_text().split():
            (parent / "cgroup.procs").write_text(process)
        group.rmdir()


def can_slow(directory: Path) -> bool:
    try:
        with slow_drive(1.0, directory):
            return True
    except (OSError, StopIteration):
        return False


def run(case: Case, store: Store, directory: Path) -> Run:
    """With probes of its own: where they are remembered is gone afterwards."""
    work = Work(case.batch, case.prompt, case.new, case.tier)
    given = EngineOptions(
        store=store.path,
        device="cpu",
        stages=case.stages,
        device_memory=1024 * MIB,
        storage="direct",
        dtype="float32",
        **dict(case.more),
    )
    with (
        tempfile.TemporaryDirectory() as cache,
        remembered_in(cache),
        slow_drive(case.limit, directory),
    ):
        options = options_of(given, work, store)
        opened = running_engine(options) if case.stages > 1 else local_engine(options)
        with opened as engine:
            engine.wait_host_tier()
            return measure(engine, case, store)


@contextmanager
def remembered_in(folder: str) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


def measure(engine: Engine, case: Case, store: Store) -> Run:
    driver, words = Driver(engine), store.config["vocab_size"]
    driver.add(random_prompts(min(4, case.batch), 8, words, seed=1), WARMUP_TOKENS)
    driver.run()
    driver.steps.clear()
    driver.add(random_prompts(case.batch, case.prompt, words), case.new)
    driver.run()
    found = steady(driver.steps, case.batch, engine.plan.passes_in_flight)
    inputs, plan = engine.inputs, engine.plan
    assert inputs is not None
    expected = plan_seconds(
        plan,
        inputs.shape,
        inputs.profiles,
        inputs.links,
        case.batch,
        case.prompt + case.new // 2,
    )
    return Run(
        expected,
        found.seconds,
        plan.prediction.pass_seconds,
        plan.prediction.bound_by,
        sum(profile.nvme_gbps for profile in inputs.profiles),
    )


def table_of(runs: dict[str, list[Run]]) -> tuple[Table, float]:
    table = Table(title="A round of decodes, expected and measured", title_justify="left")
    for name in ("configuration", "bound by", "drive GB/s", "expected ms", "measured ms", "off by",
                 "errors of all runs"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("configuration", "bound by") else "right")
    errors = []
    for name, some in runs.items():
        middle = sorted(some, key=lambda one: one.error)[len(some) // 2]
        errors.append(abs(middle.error))
        table.add_row(
            name,
            middle.bound_by,
            f"{middle.drive_gbps:.2f}",
            f"{middle.expected * 1e3:.1f}",
            f"{middle.measured * 1e3:.1f}",
            f"{middle.error:+.0%}",
            " ".join(f"{one.error:+.0%}" for one in some),
        )
    return table, statistics.median(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    console, slows = Console(width=110), can_slow(args.directory)
    if not slows:
        console.print(
            "No cgroup can be made here: drives stay as they are, and such rows are left out."
        )
    cases = [
        case
        for case in CASES
        if (slows or case.limit is None)
        and (not args.only or any(o in case.name for o in args.only))
    ]
    runs: dict[str, list[Run]] = {case.name: [] for case in cases}
    with tempfile.TemporaryDirectory(prefix="headrace-what-if-", dir=args.directory) as folder:
        store = write_store(Path(folder) / "store", CONFIG, "bf16")
        for _ in range(args.repeats):
            for case in cases:
                runs[case.name].append(run(case, store, args.directory))
                last = runs[case.name][-1]
                console.print(
                    f"{case.name}: expected {last.expected * 1e3:.1f} ms,"
                    f" measured {last.measured * 1e3:.1f} ms"
                )
    table, median = table_of(runs)
    console.print(table)
    console.print(f"median error {median:.0%}")


if __name__ == "__main__":
    main()
