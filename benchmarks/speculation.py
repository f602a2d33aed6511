"""N-gram speculation: tokens a sequence gets of a pass, and what guesses cost where they are wrong.

    python benchmarks/speculation.py [--gbps 0.05] [--sequences 4] [--rounds 5] [--resident]

Runs the bundled model on a CPU, on one stage in this process that streams all layers from a drive of
so many GB/s: the real one, whose reads are held back. The same requests take turns with and without
speculation, and medians of the turns are compared; a third kind forces guesses, wherever they cost. `--resident` streams
nothing: by default there must be no guesses then.

So small a model copies nothing from its prompt. What repeats itself here are greedy answers to senseless
letters, which go round in circles; free text are stories that it is asked for, at temperature 0.8.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from headrace.cluster.bench import local
from headrace.cluster.discovery import Discovery, discover
from headrace.cluster.encoding.encoder import Encoder
from headrace.cluster.engine import Engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.rows import chat_tokens
from headrace.runtime import stage_start
from headrace.runtime.conversion.convert import convert
from headrace.runtime.memory.held import Holding
from headrace.runtime.streaming.loads import Load, Storage
from headrace.runtime.streaming.storage import choose_storage
from headrace.scheduler.request import SamplingParams

EXAMPLES = Path(__file__).parents[1] / "examples"


class _Held:
    """A load that is over when a drive of that speed would have ended it."""

    def __init__(self, load: Load, over: float) -> None:
        self._load, self._over = load, over

    def wait(self) -> None:
        self._load.wait()
        time.sleep(max(0.0, self._over - time.perf_counter()))


class SlowDrive:
    """A storage that reads no faster than `gbps`, one load after the other."""

    name = "slow"

    def __init__(self, storage: Storage, gbps: float) -> None:
        self._storage, self._gbps, self._free = storage, gbps, 0.0

    def load(self, file: Path, offset: int, dest: torch.Tensor) -> Load:
        begins = max(time.perf_counter(), self._free)
        self._free = begins + dest.nbytes / self._gbps / 1e9
        return _Held(self._storage.load(file, offset, dest), self._free)

    def memory(self) -> Iterable[Holding]:
        return self._storage.memory()

    def close(self) -> None:
        self._storage.close()


@contextmanager
def slow_drive(gbps: float) -> Iterator[None]:
    """Engines of this process read from a drive of that speed, and plan for it."""

    def choose(*args: object, **options: object) -> Storage:
        return SlowDrive(choose_storage(*args, **options), gbps)  # type: ignore[arg-type]

    def found(device: str, store: str) -> Discovery:
        real = discover(device, store)
        return replace(real, profile=replace(real.profile, nvme_gbps=gbps))

    with (
        patch.object(stage_start, "choose_storage", choose),
        patch.object(local, "discover", found),
    ):
        yield


@dataclass(frozen=True, slots=True)
class Turn:
    """What one run of all requests took: seconds and tokens, and tokens a sequence got of a pass."""

    seconds: float
    tokens: int
    tokens_a_pass: float
    drafts: int
    acceptance: float
    answers: tuple[tuple[int, ...], ...]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def run(engine: Engine, prompts: Sequence[list[int]], params: SamplingParams) -> Turn:
    before, tokens = engine.stats.drafts, engine.stats.output_tokens
    started, done = time.perf_counter(), {}
    ids = [engine.add(prompt, params, seed=i) for i, prompt in enumerate(prompts)]
    while engine.has_work:
        for completion in engine.step():
            done[completion.request_id] = tuple(completion.token_ids)
    seconds, counts = time.perf_counter() - started, engine.stats.drafts.since(before)
    return Turn(
        seconds,
        engine.stats.output_tokens - tokens,
        counts.tokens_a_pass,
        counts.drafts,
        counts.acceptance,
        tuple(done[i] for i in ids),
    )


def repeating(engine: Engine, count: int) -> list[list[int]]:
    """Letters without sense, of which the model makes something that it says again and again."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefg ", k=60)) for _ in range(count)]
    return [engine.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def asked(engine: Engine, count: int) -> list[list[int]]:
    lines = (EXAMPLES / "prompts.jsonl").read_text().splitlines()[:count]
    encoder = Encoder(engine.tokenizer)
    return [chat_tokens(encoder, json.loads(line)["messages"]) for line in lines]


def measure(store: Path, args: argparse.Namespace, table: Table) -> None:
    options = EngineOptions(
        store=store,
        device="cpu",
        dtype="float32",
        device_memory=256 << 20,
        host_memory=0,
        context=512,
        max_sequences=args.sequences,
        min_sequences=args.sequences,
        resident_layers=None if args.resident else 0,
    )
    with ExitStack() as stack:
        if not args.resident:
            stack.enter_context(slow_drive(args.gbps))
        ways = {"off": 0, "auto": None, "8, forced": 8}
        engines = {
            name: stack.enter_context(
                local.local_engine(replace(options, ngram_speculation=drafts))
            )
            for name, drafts in ways.items()
        }
        some = engines["off"]
        work = {
            "repeating, greedy": (repeating(some, args.sequences), 0.0),
            "free, at 0.8": (asked(some, args.sequences), 0.8),
        }
        for title, (prompts, temperature) in work.items():
            params = SamplingParams(
                temperature=temperature, max_tokens=args.tokens, ignore_eos=True
            )
            turns: dict[str, list[Turn]] = {name: [] for name in ways}
            for _ in range(args.rounds):
                for name, engine in engines.items():
                    turns[name].append(run(engine, prompts, params))
            show(title, turns, table)


def show(title: str, turns: dict[str, list[Turn]], table: Table) -> None:
    answers = {turn.answers for some in turns.values() for turn in some}
    assert len(answers) == 1, "speculation changed an answer"
    base = statistics.median(turn.rate for turn in turns["off"])
    for name, some in turns.items():
        rate, one = statistics.median(turn.rate for turn in some), some[-1]
        table.add_row(
            title,
            name,
            f"{one.tokens_a_pass:.2f}",
            f"{one.drafts:,}, {one.acceptance:.0%} right",
            f"{rate:.1f}",
            f"{rate / base:.3f}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gbps", type=float, default=0.05)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resident", action="store_true")
    args = parser.parse_args()
    drive = "nothing streams" if args.resident else f"a drive of {args.gbps} GB/s"
    table = Table(title=f"{args.sequences} sequences, {drive}")
    for name in ("text", "guesses", "tokens a pass", "guessed", "tokens/s", "of off"):
        table.add_column(name)
    with tempfile.TemporaryDirectory() as folder:
        convert(EXAMPLES / "stories-9m", Path(folder) / "store", format="nf4")
        measure(Path(folder) / "store", args, table)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
