"""Streaming a 70B shape round one or two GPUs: seconds per decode pass, and the share of the bound.

    python benchmarks/ring.py STORE --tiers nvme host
    python benchmarks/ring.py STORE --stages 2 --tiers host --placements cyclic contiguous
    python benchmarks/ring.py STORE --tiers host --profile trace.json

STORE is made if there is none: by default 20 of the 80 layers of Llama 70B in NF4, random weights.
Nothing is resident unless --resident-layers says so. Every case runs real Ray actors (--local: this
process). A pass counts when all sequences decode and none is in its prompt; its time is the median.

Two bounds are given: the plan's, from the speeds that the engine measured for itself, and the raw
one, from bandwidths measured beside each case: O_DIRECT reads of the same files (the better of before
and after), and copies of one slot from pinned memory to all GPUs at once.
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from local import Breakdown, InlinePipeline, breakdown_table, local_engine, profile_passes
from measure import (
    GIGA,
    DeviceMeter,
    Driver,
    Steady,
    copy_gbps,
    disk_gbps,
    host_memory_cap,
    random_prompts,
    steady,
)
from random_store import FORMATS, write_store
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, config_of

from headrace.cluster.cli.plan import describe
from headrace.cluster.cli.sizes import parse_size
from headrace.cluster.engine import Engine
from headrace.cluster.launch import EngineOptions, resolve_device, running_engine
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.pages import pages_for
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan import PAGE_TOKENS

TIERS = ("nvme", "host", "device")
PROFILED = 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("store", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-70b")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--format", choices=FORMATS, default="nf4")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=["nvme", "host"])
    parser.add_argument("--stages", nargs="+", type=int, default=[1])
    parser.add_argument("--placements", nargs="+", default=["cyclic"], help="for several stages")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens")
    parser.add_argument("--warmup", type=int, default=8, help="sequences served before, 2 tokens")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device-memory", type=parse_size, help="per stage")
    parser.add_argument("--host-memory", type=parse_size, help="per stage, for the tier host")
    parser.add_argument("--cap-host-memory", type=parse_size, help="of everything, by a cgroup")
    parser.add_argument("--resident-layers", type=int, default=0)
    parser.add_argument("--token-budget", type=int)
    parser.add_argument("--micro-batches", type=int)
    parser.add_argument("--storage", default="auto", help="auto, direct, buffered or kvikio")
    parser.add_argument("--local", action="store_true", help="one stage in this process, no Ray")
    parser.add_argument("--profile", type=Path, help="trace two decode passes into this file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args()


@dataclass(frozen=True, slots=True)
class Case:
    stages: int
    tier: str
    placement: str

    @property
    def name(self) -> str:
        return f"{self.stages} x {self.tier}" + (f", {self.placement}" if self.stages > 1 else "")


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for stages, tier in product(arguments.stages, arguments.tiers):
        for placement in arguments.placements if stages > 1 else ("auto",):
            yield Case(stages, tier, placement)


def context_of(arguments: argparse.Namespace) -> int:
    """A page more than a sequence needs: admission leaves some free, so without any it admits fewer."""
    return (pages_for(arguments.prompt + arguments.new) + 1) * PAGE_TOKENS


def options_of(arguments: argparse.Namespace, case: Case, store: Store) -> EngineOptions:
    layers = sum(block.nbytes for block in store.layers)
    host = arguments.host_memory if arguments.host_memory is not None else layers
    # Contiguous stages have a pass each in flight, which share the sequences.
    groups = case.stages if case.placement == "contiguous" else 1
    return EngineOptions(
        store=store.path,
        stages=case.stages,
        device=arguments.device,
        dtype=arguments.dtype,
        device_memory=arguments.device_memory,
        host_memory=host if case.tier == "host" else 0,
        placement=case.placement,
        token_budget=arguments.token_budget,
        max_sequences=-(-arguments.batch // groups),
        micro_batches=arguments.micro_batches,
        resident_layers=None if case.tier == "device" else arguments.resident_layers,
        context=context_of(arguments),
        storage=arguments.storage,
    )


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds that a round cannot be faster than, by the plan and by what was measured beside it."""

    plan: float
    bound_by: str
    raw: float
    disk_gbps: float
    copy_gbps: float


def bounds(plan: Plan, disk: float, copy: float) -> Bounds:
    rounds = plan.passes_in_flight
    nvme = [count * rounds for count in plan.nvme_bytes_a_pass]
    host = [count * rounds for count in plan.host_bytes_a_pass]
    link = max(a + b for a, b in zip(nvme, host, strict=True))
    raw = max(sum(nvme) / disk, link / copy) / GIGA
    return Bounds(plan.prediction.pass_seconds, plan.prediction.bound_by, raw, disk, copy)


def run_case(arguments: argparse.Namespace, case: Case, store: Store) -> dict[str, Any]:
    device = resolve_device(arguments.device)
    disk = disk_gbps(store.layers)
    copy = copy_gbps(device, case.stages, max(block.nbytes for block in store.layers))
    options, meter = options_of(arguments, case, store), DeviceMeter()
    if meter.base:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with open_engine(arguments, options) as engine:
        ready = time.perf_counter() - started
        check_room(engine.plan, arguments)
        driver = Driver(engine, meter)
        driver.add(random_prompts(arguments.warmup, arguments.prompt, seed=1), 2)
        driver.run()
        driver.steps.clear()
        driver.add(random_prompts(arguments.batch, arguments.prompt), arguments.new)
        driver.run()
        meter.sample()
        found = steady(driver.steps, arguments.batch, engine.plan.passes_in_flight)
        result = described(arguments, engine.plan, found, bounds(engine.plan, disk, copy))
        allocated = torch.cuda.max_memory_allocated() if arguments.local and meter.base else None
        steps = [(round(step.seconds, 6), step.committed) for step in driver.steps]
    if case.tier == "nvme":
        # A drive's speed drifts, and a bound is the best that it did.
        best = bounds(engine.plan, max(disk, disk_gbps(store.layers)), copy)
        result = described(arguments, engine.plan, found, best)
    return {
        "case": case.name,
        **result,
        "start_seconds": ready,
        "peak_device_bytes": meter.most,
        "peak_allocated_bytes": allocated,
        "steps": steps,
    }


def check_room(plan: Plan, arguments: argparse.Namespace) -> None:
    """The planner keeps no KV for sequences that would not raise the throughput."""
    room = plan.num_pages * PAGE_TOKENS // context_of(arguments)
    if room < arguments.batch:
        raise HeadraceError(
            f"the plan has KV for {room} sequences at once: use --batch {room}, or more memory"
        )


def open_engine(
    arguments: argparse.Namespace, options: EngineOptions
) -> AbstractContextManager[Engine]:
    return local_engine(options) if arguments.local else running_engine(options)


def described(
    arguments: argparse.Namespace, plan: Plan, found: Steady, bound: Bounds
) -> dict[str, Any]:
    seconds = found.seconds
    return {
        "placement": describe(plan.placement),
        "pass_seconds": seconds,
        "rounds": len(found.rounds),
        "prefill_seconds": found.prefill_seconds,
        "prefill_tokens_per_second": arguments.batch * arguments.prompt / found.prefill_seconds,
        "tokens_per_second": arguments.batch / seconds,
        "bound": asdict(bound),
        "share_of_plan_bound": bound.plan / seconds,
        "share_of_raw_bound": bound.raw / seconds,
        "nvme_gbps": sum(stage.nvme_bytes for stage in found.stages) / seconds / GIGA,
        "host_gbps": sum(stage.host_bytes for stage in found.stages) / seconds / GIGA,
        "stages": [asdict(stage) for stage in found.stages],
        "terms": plan.prediction.terms,
        "planned_device_bytes": max(memory.device for memory in plan.memory),
        "micro_batches": plan.micro_batches,
        "token_budget": plan.token_budget,
        "passes_in_flight": plan.passes_in_flight,
        "ring_slots": plan.ring_slots,
    }


def table(results: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> Table:
    what = f"{arguments.batch} sequences, {arguments.prompt} + {arguments.new} tokens"
    found = Table(title=f"{arguments.shape}, {arguments.layers} layers, {arguments.format}: {what}")
    for name in (
        "case", "s/pass", "prefill s", "tok/s", "plan bound", "share", "raw bound", "share",
        "NVMe GB/s", "host GB/s", "wait: weights", "links", "GPU GiB", "planned",
    ):  # fmt: skip
        found.add_column(name, justify="left" if name == "case" else "right")
    for result in results:
        if "error" in result:
            found.add_row(result["case"], result["error"])
            continue
        bound, stages = result["bound"], result["stages"]
        found.add_row(
            result["case"],
            f"{result['pass_seconds']:.4f}",
            f"{result['prefill_seconds']:.2f}",
            f"{result['tokens_per_second']:.1f}",
            f"{bound['plan']:.4f} {bound['bound_by']}",
            f"{result['share_of_plan_bound']:.2f}",
            f"{bound['raw']:.4f}",
            f"{result['share_of_raw_bound']:.2f}",
            f"{result['nvme_gbps']:.2f} of {bound['disk_gbps']:.2f}",
            f"{result['host_gbps']:.1f} of {bound['copy_gbps']:.1f}",
            "/".join(f"{stage['weights_wait']:.3f}" for stage in stages),
            "/".join(f"{stage['link_wait']:.3f}" for stage in stages),
            f"{result['peak_device_bytes'] / 2**30:.2f}",
            f"{result['planned_device_bytes'] / 2**30:.2f}",
        )
    return found


def run_profile(arguments: argparse.Namespace, case: Case, store: Store) -> Breakdown:
    """Two passes of decodes only, by one stage in this thread."""
    with local_engine(options_of(arguments, case, store), InlinePipeline) as engine:
        driver = Driver(engine)
        driver.add(random_prompts(arguments.batch, arguments.prompt), arguments.new)
        while driver.step().committed < arguments.batch:
            if not engine.has_work:
                raise HeadraceError("no pass decodes all sequences; give more new tokens")
        driver.step()
        return profile_passes(driver.step, PROFILED, arguments.profile)


def main() -> None:
    arguments = parse()
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.ERROR)
    if arguments.verbose:
        os.environ["HEADRACE_LOG"] = "INFO"
    console = Console(width=None if Console().is_terminal else 200)
    store = write_store(
        arguments.store, config_of(arguments.shape, arguments.layers), arguments.format
    )
    results: list[dict[str, Any]] = []
    with host_memory_cap(arguments.cap_host_memory):
        for case in cases(arguments):
            try:
                if arguments.profile:
                    console.print(breakdown_table(case.name, run_profile(arguments, case, store)))
                    continue
                results.append(run_case(arguments, case, store))
            except HeadraceError as error:
                results.append({"case": case.name, "error": str(error)})
                console.print(f"{case.name}: {error}", markup=False)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
    if results:
        console.print(table(results, arguments))


if __name__ == "__main__":
    try:
        main()
    except HeadraceError as error:
        raise SystemExit(str(error)) from None
