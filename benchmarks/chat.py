"""Conversations that come back: how long the next turn's first token takes, and what is computed again.

    python benchmarks/chat.py [--conversations 64] [--turns 6] [--on-device 8] [--directory /mnt/nvme]

Runs the bundled model on a CPU, on one stage in this process. Conversations speak one after the other, turn by turn, so that the
device has forgotten each when it comes back. Keys and values have room on the device alone, also in
host RAM (for all), or also on NVMe (for all, with as much in host RAM as on the device).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from headrace.cluster.bench.driver import random_prompts
from headrace.cluster.bench.local import local_engine
from headrace.cluster.completion import Completion
from headrace.cluster.engine import Engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.run_plan import local_plan
from headrace.runtime.conversion.convert import convert
from headrace.runtime.store import Store
from headrace.scheduler.inputs import KV_LOG_BYTES
from headrace.scheduler.kv_stats import TierHits
from headrace.scheduler.memory import slot_bytes
from headrace.scheduler.pages import pages_for
from headrace.scheduler.request import SamplingParams

STORIES = Path(__file__).parents[1] / "examples" / "stories-9m"


@dataclass(frozen=True, slots=True)
class Chat:
    """In a turn `said` tokens by the user and `answered` by the model; `on_device` conversations have
    room there, at their full length."""

    conversations: int
    turns: int
    said: int
    answered: int
    on_device: int

    @property
    def context(self) -> int:
        return self.turns * (self.said + self.answered)


@dataclass(frozen=True, slots=True)
class Turn:
    """A conversation that came back: tokens of its prompt, those computed, seconds to the first token."""

    prompt: int
    computed: int
    seconds: float


def hold(engine: Engine, chat: Chat, vocabulary: int) -> Iterator[Turn]:
    """Have all conversations; yields the turns that are not a conversation's first."""
    words = iter(random_prompts(chat.conversations * chat.turns, chat.said, vocabulary, seed=1))
    told: list[list[int]] = [[] for _ in range(chat.conversations)]
    for turn in range(chat.turns):
        for tokens in told:
            tokens += next(words)
            before, prompt = engine.stats.kv.hits.tokens.total, len(tokens)
            seconds, answer = ask(engine, tokens, chat.answered)
            if turn:
                found = engine.stats.kv.hits.tokens.total - before
                yield Turn(prompt, prompt - found, seconds)
            tokens += answer


def ask(engine: Engine, tokens: list[int], answered: int) -> tuple[float, list[int]]:
    """Seconds to the first token, and the answer."""
    params = SamplingParams(temperature=0.0, max_tokens=answered, ignore_eos=True)
    drawn, done = engine.stats.output_tokens, list[Completion]()
    started = time.perf_counter()
    engine.add(tokens, params, seed=0, keep=engine.plan.host_pages > 0)
    while engine.stats.output_tokens == drawn:
        done += engine.step()
    seconds = time.perf_counter() - started
    while engine.has_work:
        done += engine.step()
    (completion,) = done
    return seconds, completion.token_ids


def measure(name: str, options: EngineOptions, chat: Chat, table: Table) -> None:
    vocabulary = Store.open(options.store).config["vocab_size"]
    with local_engine(options) as engine:
        started = time.perf_counter()
        turns = list(hold(engine, chat, vocabulary))
        whole = time.perf_counter() - started
        plan, kv = engine.plan, engine.stats.kv
    seconds = sorted(turn.seconds for turn in turns)
    last = [turn for turn in turns if turn.prompt == max(turn.prompt for turn in turns)]
    table.add_row(
        name,
        f"{plan.num_pages} + {plan.host_pages} + {plan.nvme_pages}",
        f"{statistics.median(seconds) * 1e3:.0f} ms",
        f"{seconds[len(seconds) * 95 // 100] * 1e3:.0f} ms",
        f"{statistics.median(turn.seconds for turn in last) * 1e3:.0f} ms",
        f"{sum(turn.computed for turn in turns):,} of {sum(turn.prompt for turn in turns):,}",
        _pages(kv.hits),
        f"{whole:.0f} s",
    )


def _pages(hits: TierHits) -> str:
    return f"{hits.device}, {hits.host}, {hits.nvme}"


def variants(store: Path, chat: Chat, folder: Path) -> Iterator[tuple[str, EngineOptions]]:
    """Device only, host RAM for all, and NVMe for all."""
    common = EngineOptions(
        store,
        device="cpu",
        device_memory=2 << 30,
        host_memory=0,
        context=chat.context,
        max_sequences=chat.on_device,
    )
    plan = local_plan(common, Store.open(store))
    slot = slot_bytes(plan.memory[0].kv // plan.num_pages)
    pages = pages_for(chat.context)
    every, some = (count * pages * slot for count in (chat.conversations, chat.on_device))
    yield "device", common
    yield "and host RAM", replace(common, host_memory=every, kv_host_memory=every)
    yield (
        "and NVMe",
        replace(
            common,
            host_memory=some + KV_LOG_BYTES,
            kv_host_memory=some,
            kv_directory=folder / "kv",
            kv_disk=2 * every,  # room is made of whole files
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--said", type=int, default=154, help="tokens a turn by the user")
    parser.add_argument("--answered", type=int, default=4, help="and by the model")
    parser.add_argument("--on-device", type=int, default=8, help="conversations with room there")
    parser.add_argument("--directory", type=Path, help="on the drive (default: $TMPDIR)")
    given = parser.parse_args()
    console = Console(width=140)
    chat = Chat(given.conversations, given.turns, given.said, given.answered, given.on_device)
    table = Table(title=f"{chat.conversations} conversations, {chat.turns} turns, returning turns")
    for name in ("keys and values", "pages", "first token", "95%", "last turn"):
        table.add_column(name)
    for name in ("tokens computed", "pages found: device, host, NVMe", "in all"):
        table.add_column(name)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=given.directory) as made:
        store = convert(STORIES, Path(made) / "store", format="nf4").path
        for name, options in variants(store, chat, Path(made)):
            measure(name, options, chat, table)
            console.print(table)


if __name__ == "__main__":
    main()
