"""What converting and running take in memory, against what the plan says.

    python benchmarks/memory.py [--layers 28] [--device-memory 600MB] [--directory /mnt/nvme]

Writes a random bf16 Llama checkpoint (hidden 2048, 4 GB by default), converts it in a process of
its own to each format, runs on CPU stages as many full contexts as the plan has room for, and deletes
everything. Resident memory is sampled every 20 ms. A stage should take what the plan counts as
device, host layers, embedding and process.
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

import psutil
import ray
from rich.console import Console
from rich.table import Table

from headrace.cluster.bench.random_store import write_checkpoint
from headrace.cluster.bench.shapes import config_of
from headrace.cluster.llm import LLM
from headrace.runtime.conversion.convert import convert
from headrace.scheduler.request import SamplingParams

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
}
CONTEXT = 512
STAGE = "StageActor"
"""In the title that Ray gives a stage's process."""


class Peaks:
    """The highest resident memory of the processes below this one whose title holds `title`."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._highest: dict[int, int] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stopping.wait(0.02):
            for process in psutil.Process().children(recursive=True):
                try:
                    if self._title in " ".join(process.cmdline()):
                        self._note(process)
                except psutil.Error:
                    continue

    def _note(self, process: psutil.Process) -> None:
        now = process.memory_info().rss
        self._highest[process.pid] = max(now, self._highest.get(process.pid, 0))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    @property
    def highest(self) -> dict[int, int]:
        """Bytes by process id."""
        return dict(self._highest)


def _convert(source: Path, dest: Path, fmt: str, answer: Connection) -> None:
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    answer.send(before)
    convert(source, dest, format=fmt)
    answer.send(time.perf_counter() - start)


def measure_conversion(source: Path, dest: Path, fmt: str, table: Table) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_convert, args=(source, dest, fmt, theirs))
    with Peaks("spawn_main") as peaks:
        process.start()
        before, seconds = ours.recv(), ours.recv()
    process.join()
    size = sum(file.stat().st_size for file in dest.glob("*.safetensors"))
    highest = max(peaks.highest.values())
    table.add_row(dest.name, gb(size), gb(before), gb(highest), f"{seconds:.0f} s")


def measure_run(store: Path, arguments: argparse.Namespace, table: Table) -> None:
    """One line a stage."""
    params = SamplingParams(temperature=0.0, max_tokens=arguments.tokens, ignore_eos=True)
    with (
        Peaks(STAGE) as peaks,
        LLM(
            store,
            stages=arguments.stages,
            device="cpu",
            device_memory=arguments.device_memory,
            host_memory=arguments.host_memory,
            context=CONTEXT,
        ) as llm,
    ):
        # Pages that no token reaches are never touched.
        rows = llm.plan.max_sequences * llm.plan.passes_in_flight
        prompts = [[i, *range(5, CONTEXT - arguments.tokens + 4)] for i in range(rows)]
        start = time.perf_counter()
        llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        memory, pids = llm.plan.memory, stage_pids(llm)
    for stage, (plan, pid) in enumerate(zip(memory, pids, strict=True)):
        real = peaks.highest[pid]
        parts = (plan.device, plan.host, plan.embed, plan.process)
        said = sum(parts)
        table.add_row(
            f"{store.name}, stage {stage}",
            *map(gb, (*parts, said, real)),
            f"{real / said - 1:+.1%}",
            f"{seconds:.0f} s",
        )


def stage_pids(llm: LLM) -> list[int]:
    """Process ids in the order of the stages; Ray starts workers in any order."""
    actors = llm._engine._pipeline._actors  # type: ignore[attr-defined]
    pids = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors])
    return list(map(int, pids))


def gb(size: float) -> str:
    return f"{size / 1e9:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--formats", default="nf4,keep", help="with commas between")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--device-memory", default="600MB", help="per stage")
    parser.add_argument("--host-memory", default="0", help="per stage")
    parser.add_argument("--tokens", type=int, default=4, help="to generate for each row")
    parser.add_argument("--directory", type=Path, help="where the files go (default: $TMPDIR)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="headrace-bench-", dir=arguments.directory))
    conversions = Table("store", "bytes", "before", "peak", "time", title="Converting, GB resident")
    runs = Table("stage", "device", "host layers", "embed", "process", title="Running, GB resident")
    for name in ("plan", "peak", "off by", "time"):
        runs.add_column(name)
    try:
        write_checkpoint(folder / "checkpoint", config_of("8b", arguments.layers) | SHAPE)
        for fmt in arguments.formats.split(","):
            measure_conversion(folder / "checkpoint", folder / fmt, fmt, conversions)
            measure_run(folder / fmt, arguments, runs)
            shutil.rmtree(folder / fmt)
    finally:
        shutil.rmtree(folder)
    Console().print(conversions, runs)


if __name__ == "__main__":
    main()
