"""What of a pass is lost because its micro-batches are not alike, or are padded: the real scheduler, no device.

    python benchmarks/micro_batches.py [--passes 300] [--seed 0]

Prompts are log-normal (median 512 tokens, sigma 1, cut to 64 and 4096), answers too (median 128, cut to 16 and 512); there
are always as many requests as a pass has sequences, and as many again wait. What a micro-batch takes is what the planner
expects of its rows, weights and keys. A pass goes round stages that have a model's layers in turn, one a visit, each loaded
from host RAM beside the one that computes (`streamed`), or there already (`resident`).

Slices are packed in three ways: `whole`, as where there is one stage; `by cost`, the same by the seconds that each adds, longest first
and each where there is least to do; and `cut`, in which prompts are in parts. `excess` is the slowest micro-batch over the mean, less 1;
passes are shown over those of `whole`. `graph rows` are those that CUDA graphs of decodes compute for nothing, over
all rows; nothing else is padded.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import exp, log

from rich.console import Console
from rich.table import Table

from headrace.runtime.graphs import padded_rows
from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.decode import GIGA, TERA, Decode, layer_seconds
from headrace.scheduler.inputs import DeviceProfile, ModelShape
from headrace.scheduler.layouts import GRAPH_ROWS
from headrace.scheduler.limits import LEAST_PART
from headrace.scheduler.plan import Pass, Sample, Slice
from headrace.scheduler.policy import attention_work
from headrace.scheduler.request import Request, SamplingParams
from headrace.scheduler.scheduler import Scheduler

GPU = DeviceProfile("cuda", 7.0, 24.0, 100.0, 1000.0, 2e-4, 10.0)
"""Round numbers of a GPU with 1 TB/s: drive, host link, TFLOPS, memory, and hops."""

LAYERS = 48
"""Which stages have in turn, one a visit."""

SHAPES = {"70b NF4": (480_000_000, 855_638_016, 8192), "8b NF4": (123_000_000, 218_103_808, 4096)}
"""Bytes of a layer, its matrix elements and its hidden size; both have 8 KV heads of 128."""

RINGS = ((2, 2), (2, 4), (2, 8), (3, 6), (4, 4), (4, 8))
"""Stages, and micro-batches of a pass."""

SEQUENCES = (4, 16, 64)
"""Of each micro-batch."""

TOKEN_BUDGET = 2048

Packing = Sequence[Sequence[Slice]]


def shape_of(name: str) -> ModelShape:
    layer_bytes, parameters, hidden = SHAPES[name]
    return ModelShape(
        layer_bytes=(layer_bytes,),
        kv_format="bf16",
        layer_kv_bytes=(64 * 8 * 128 * 4,),
        layer_parameters=(parameters,),
        layer_active_parameters=(parameters,),
        largest_matrix=0,
        embed_bytes=0,
        head_bytes=0,
        hidden_size=hidden,
        vocab_size=0,
        intermediate_size=0,
        max_context=8192,
        compute_bytes=2,
        needs_scratch=True,
    )


def seconds(shape: ModelShape, pieces: Sequence[Slice]) -> float:
    """Of one layer, by the planner's formulas, with the keys that these slices have instead of a common context."""
    rows = sum(len(piece.tokens) for piece in pieces)
    decode = Decode(rows, 0, micro_batches=1, passes_in_flight=1)
    keys = sum(attention_work(piece) for piece in pieces if len(piece.tokens) > 1)
    pages = sum(piece.num_pages for piece in pieces)
    attention = 4.0 * shape.hidden_size * keys / (GPU.tflops * TERA)
    reading = pages * shape.layer_kv_bytes[0] / (GPU.hbm_gbps * GIGA)
    return layer_seconds(shape, 0, decode, GPU) + attention + reading


def by_cost(pieces: Sequence[Slice], count: int, cost: Callable[[Slice], float]) -> Packing:
    """Longest first, each to whatever has least to do."""
    bins: list[list[Slice]] = [[] for _ in range(min(count, len(pieces)))]
    loads = [0.0] * len(bins)
    for piece in sorted(pieces, key=cost, reverse=True):
        least = loads.index(min(loads))
        bins[least].append(piece)
        loads[least] += cost(piece)
    return bins


def round_the_ring(times: Sequence[float], stages: int, load: float = 0.0) -> float:
    """Seconds of a pass whose micro-batches take `times` a layer, each of which is loaded in `load` into one of two slots of its stage."""
    idle, ready = [0.0] * stages, [0.0] * len(times)
    loaded, released = [0.0] * stages, [[0.0, 0.0] for _ in range(stages)]
    for layer in range(LAYERS):
        stage = layer % stages
        loaded[stage] = max(loaded[stage], released[stage].pop(0)) + load
        now = max(idle[stage], loaded[stage])
        for batch, took in enumerate(times):
            ready[batch] = now = max(now, ready[batch]) + took
        idle[stage] = now
        released[stage].append(now)
    return max(ready)


@dataclass(slots=True)
class Sums:
    """Of all passes, in seconds."""

    slowest: float = 0.0
    mean: float = 0.0
    resident: float = 0.0
    streamed: float = 0.0

    def add(self, times: Sequence[float], stages: int, load: float) -> None:
        self.slowest, self.mean = self.slowest + max(times), self.mean + sum(times) / len(times)
        self.resident += round_the_ring(times, stages)
        self.streamed += round_the_ring(times, stages, load)

    @property
    def excess(self) -> str:
        return f"{self.slowest / self.mean - 1:.0%}"


@dataclass(slots=True)
class Row:
    whole: Sums = field(default_factory=Sums)
    cost: Sums = field(default_factory=Sums)
    cut: Sums = field(default_factory=Sums)
    rows: int = 0
    graph_rows: int = 0

    def add(self, shape: ModelShape, whole: Packing, cut: Packing, stages: int, most: int) -> None:
        pieces = [piece for batch in whole for piece in batch]
        costs = {piece.request: seconds(shape, [piece]) for piece in pieces}
        by = by_cost(pieces, most, lambda piece: costs[piece.request])
        load = shape.layer_bytes[0] / (GPU.host_gbps * GIGA)
        for sums, packing in ((self.whole, whole), (self.cost, by), (self.cut, cut)):
            sums.add([seconds(shape, batch) for batch in packing], stages, load)
        for batch in cut:
            self._pad(batch)

    def _pad(self, batch: Sequence[Slice]) -> None:
        count = sum(len(piece.tokens) for piece in batch)
        self.rows += count
        if count == len(batch) <= GRAPH_ROWS:
            self.graph_rows += min(padded_rows(count), GRAPH_ROWS) - count

    @property
    def shown(self) -> tuple[str, ...]:
        whole, cost, cut = self.whole, self.cost, self.cut
        return (
            whole.excess, cost.excess, cut.excess,
            f"{cost.streamed / whole.streamed:.2f}", f"{cut.streamed / whole.streamed:.2f}",
            f"{cut.resident / whole.resident:.2f}", f"{self.graph_rows / self.rows:.1%}",
        )  # fmt: skip


class Load:
    """Requests without end."""

    def __init__(self, config: SchedulerConfig, seed: int) -> None:
        self._scheduler, self._random, self._next = Scheduler(config), random.Random(seed), 0
        for _ in range(2 * config.max_sequences):
            self.ask()

    def ask(self) -> None:
        prompt, answer = self._length(512, 64, 4096), self._length(128, 16, 512)
        tokens = [self._random.randrange(1000, 100_000) for _ in range(prompt)]
        params = SamplingParams(max_tokens=answer, ignore_eos=True)
        self._scheduler.add(Request(self._next, tokens, params, seed=0))
        self._next += 1

    def _length(self, median: int, least: int, most: int) -> int:
        return min(max(round(exp(self._random.gauss(log(median), 1.0))), least), most)

    def step(self) -> Pass:
        a_pass = self._scheduler.schedule()
        assert a_pass is not None
        pieces = [piece for batch in a_pass.micro_batches for piece in batch.slices]
        samples = [Sample(p.request, 1, None, ()) for p in pieces if p.sampling is not None]
        moved = [move.number for move in a_pass.moves]
        for _ in self._scheduler.update(a_pass, samples, moved).finished:
            self.ask()
        return a_pass


def measure(name: str, stages: int, micro_batches: int, each: int, passes: int, seed: int) -> Row:
    sequences = each * micro_batches
    config = SchedulerConfig(
        num_pages=256 * sequences,
        max_context=8192,
        token_budget=TOKEN_BUDGET,
        max_sequences=sequences,
        micro_batches=micro_batches,
        micro_batch_tokens=TOKEN_BUDGET // micro_batches,
    )
    row, shape = Row(), shape_of(name)
    whole = Load(config, seed)
    cut = Load(replace(config, least_part=LEAST_PART), seed)
    for number in range(2 * passes):
        uncut, parts = ([b.slices for b in load.step().micro_batches] for load in (whole, cut))
        if number >= passes:  # the others fill the ring
            row.add(shape, uncut, parts, stages, micro_batches)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    table = Table("model", "stages", "micro-batches", "sequences", "excess: whole", "by cost", "cut",
                  "streamed: by cost", "cut", "resident: cut", "graph rows")  # fmt: skip
    for name in SHAPES:
        for stages, micro_batches in RINGS:
            for each in SEQUENCES:
                row = measure(name, stages, micro_batches, each, given.passes, given.seed)
                shown = stages, micro_batches, each * micro_batches
                table.add_row(name, *map(str, shown), *row.shown)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
