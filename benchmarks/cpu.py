"""How near decoding on a CPU comes to memory's bandwidth, with every weight resident.

    python benchmarks/cpu.py STORE --shape 1b --sequences 1 --sequences 8 --threads 2

Makes the store of random weights if it is not there. One stage per number of sequences and layout
of the 4-bit weights, all in this process; their passes and the reads that measure the bandwidth take
turns, so that what else runs on the machine disturbs all of them alike. Milliseconds are medians,
the bandwidth is the best read of the run. What a pass must read is its 4-bit weights with scales of
two bytes, what is not quantized, and the LM head.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from headrace.cluster.bench.random_store import write_store
from headrace.cluster.bench.shapes import SHAPES, config_of
from headrace.cluster.discovery import discover
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.run_plan import plan_run
from headrace.runtime.shape import model_shape
from headrace.runtime.stage import Stage
from headrace.runtime.stage_config import StageConfig
from headrace.runtime.store import Store
from headrace.scheduler.plan import PAGE_TOKENS, MicroBatch, Pass, Sampling, Slice

GREEDY = Sampling(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, None, 0, ())
READ_BYTES = 1 << 30
MANY = 1 << 20
"""A stage that may be given so many sequences keeps its weights as they are stored."""


@dataclass
class Decoder:
    """One stage that decodes `sequences` sequences, and how long its passes took, in seconds."""

    name: str
    stage: Stage
    sequences: int
    pages: int
    position: int = 0
    step: int = 0
    seconds: list[float] = field(default_factory=list)

    def run(self, tokens: int = 1) -> None:
        """One pass with the next `tokens` tokens of every sequence."""
        slices = (
            Slice(i, self.position, (5,) * tokens, self._pages(i), GREEDY)
            for i in range(self.sequences)
        )
        a_pass = Pass(self.step, (MicroBatch(tuple(slices)),))
        started = time.perf_counter()
        self.stage.run(self.stage.prepare(a_pass))
        self.seconds.append(time.perf_counter() - started)
        self.position += tokens
        self.step += 1

    def _pages(self, sequence: int) -> tuple[int, ...]:
        return tuple(range(sequence * self.pages, (sequence + 1) * self.pages))


def make_stage(store: Store, sequences: int, max_sequences: int, pages: int, threads: int) -> Stage:
    options = EngineOptions(store.path, device="cpu", dtype="bfloat16", max_sequences=sequences)
    found = discover("cpu", str(store.path.resolve()))
    plan = plan_run(options, "cpu", [found], model_shape(store, "bfloat16"))
    assert not any(plan.nvme_bytes_a_pass), "the model does not fit this machine's memory"
    return Stage(
        StageConfig(
            store=str(store.path),
            stage=0,
            plan=replace(plan, num_pages=sequences * pages, max_sequences=max_sequences),
            device="cpu",
            device_memory=found.host_free,
            dtype="bfloat16",
            storage="buffered",
            deadline=60.0,
            threads=threads,
        )
    )


def bytes_read(store: Store) -> int:
    """Bytes of weights that a pass cannot but read."""
    head = store.head.nbytes + (store.embed.nbytes if store.tied else 0)
    specs = [spec for block in store.layers for spec in block.weights.values()]
    data = sum(spec.parts["data"].nbytes for spec in specs)
    blocks = sum(spec.parts["absmax"].shape[0] for spec in specs if "absmax" in spec.parts)
    return head + data + 2 * blocks


def decoders(store: Store, arguments: argparse.Namespace, stack: ExitStack) -> Iterator[Decoder]:
    pages = -(-(arguments.context + arguments.passes + 2) // PAGE_TOKENS)
    for sequences in arguments.sequences:
        for name, most in (("as stored", MANY), ("chosen", sequences)):
            stage = make_stage(store, sequences, most, pages, arguments.threads)
            stack.enter_context(stage)
            decoder = Decoder(name, stage, sequences, pages)
            decoder.run(arguments.context)
            decoder.run()
            decoder.seconds.clear()
            yield decoder


def measure(store: Store, arguments: argparse.Namespace) -> Table:
    source = torch.ones(READ_BYTES // 4096, 2048, dtype=torch.bfloat16)
    vector, reads = torch.ones(2048, dtype=torch.bfloat16), []
    with ExitStack() as stack:
        every = list(decoders(store, arguments, stack))
        for _ in range(arguments.passes):
            for decoder in every:
                started = time.perf_counter()
                torch.mv(source, vector)  # reads faster than a sum does
                reads.append(READ_BYTES / (time.perf_counter() - started) / 1e9)
                decoder.run()
    size, best = bytes_read(store) / 1e9, max(reads)
    table = Table(title=f"{store.path.name}, {arguments.threads} threads", title_justify="left")
    for name in ("B", "4-bit layout", "ms a pass", "best", "GB", "GB/s", "measured GB/s", "share"):
        table.add_column(name, justify="right")
    for decoder in every:
        median = statistics.median(decoder.seconds)
        times = f"{median * 1e3:.1f}", f"{min(decoder.seconds) * 1e3:.1f}"
        rate = size / median
        rates = f"{size:.3f}", f"{rate:.1f}", f"{best:.1f}", f"{rate / best:.2f}"
        table.add_row(str(decoder.sequences), decoder.name, *times, *rates)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("store", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--sequences", type=int, action="append")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    arguments.sequences = arguments.sequences or [1, 8]
    torch.set_num_threads(arguments.threads)
    store = write_store(arguments.store, config_of(arguments.shape), "nf4")
    Console().print(measure(store, arguments))


if __name__ == "__main__":
    main()
