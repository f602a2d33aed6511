"""A model's shape with random weights on this machine: what was reached, and of what bound."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from headrace.cluster.bench.blind_drafts import BlindDrafter
from headrace.cluster.bench.driver import DeviceMeter, Driver, random_prompts, steady
from headrace.cluster.bench.hops import Hop, hop_actors, measure_hop
from headrace.cluster.bench.local import InlinePipeline, local_engine
from headrace.cluster.bench.phases import Measured, Phase
from headrace.cluster.bench.profile import Breakdown, profile_passes
from headrace.cluster.bench.random_store import write_store
from headrace.cluster.bench.speeds import disk_gbps, measure_profile
from headrace.cluster.engine import Engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.kv_options import check_kv_options
from headrace.cluster.launch import running_engine
from headrace.cluster.processes import ray_cluster
from headrace.cluster.run_plan import local_plan, resolve_device, resolve_dtype, shape_in
from headrace.runtime.kv_log.stats import LogReport
from headrace.runtime.shape import model_shape
from headrace.runtime.store import Store
from headrace.runtime.streaming.page_cache import available_memory
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.experts import num_experts
from headrace.scheduler.inputs import DeviceProfile
from headrace.scheduler.kv_stats import KVStats
from headrace.scheduler.memory import guest_pages
from headrace.scheduler.pages import pages_for
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan import PAGE_TOKENS, StageTimes
from headrace.scheduler.sizes import format_size
from headrace.scheduler.speculation import DraftCounts

MOST_SEQUENCES = 256
WARMUP_SEQUENCES, WARMUP_TOKENS = 8, 2
PROFILED_PASSES = 2

BRIEFLY = 2.0
"""Seconds to read from the drive before the run; for longer after one that streamed from it."""


@dataclass(frozen=True, slots=True)
class Work:
    """`batch` sequences of `prompt` + `new` tokens, all at once.

    `batch` None: as many as the plan has room for, and MOST_SEQUENCES at most. `tier` is where all
    streamed weights rest, "nvme" or "host"; "device" keeps all of them there, "auto" leaves it to
    the planner. `local`: one stage in this process, without Ray.
    """

    batch: int | None = None
    prompt: int = 128
    new: int = 32
    tier: str = "auto"
    local: bool = False

    @property
    def context(self) -> int:
        """A page more than a sequence needs: admission leaves some free, and without any it admits
        fewer."""
        return (pages_for(self.prompt + self.new) + 1) * PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class Result:
    """`decode` is a round in which all `batch` sequences advance: the median of `rounds` of them.

    `stages` are medians, too, and `drafts` what was guessed in those rounds. `kv` and `logs` say what became of KV pages. `profile` is what was measured beside the run.
    """

    plan: Plan
    batch: int
    profile: DeviceProfile
    prefill: Phase
    decode: Phase
    rounds: int
    stages: tuple[StageTimes, ...]
    start_seconds: float
    peak_device_bytes: int
    kv: KVStats
    logs: Sequence[LogReport | None]
    drafts: DraftCounts


@contextmanager
def random_store(
    directory: Path, config: Mapping[str, Any], fmt: str, *, in_memory: bool, keep: bool
) -> Iterator[Store]:
    """The store that is run: in `directory` and used again with `keep`, else gone at the end.

    `in_memory`: host memory has to hold all of its layers.

    Raises HeadraceError when the drive or host memory is too small, before anything is written.
    """

    def check(layers: Sequence[int]) -> None:
        if in_memory:
            _check_host_memory(layers)

    with ExitStack() as stack:
        if not keep:
            made = TemporaryDirectory(prefix="headrace-bench-", dir=directory)
            directory = Path(stack.enter_context(made))
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
        name = f"headrace-{config['model_type']}-{config['num_hidden_layers']}-{fmt}-{digest}"
        yield write_store(directory / name, config, fmt, check=check)


def check_request(given: EngineOptions, work: Work, directory: Path) -> None:
    """HeadraceError for what this machine lacks or what contradicts itself; takes no time."""
    check_kv_options(given)
    gpus = torch.cuda.device_count() if resolve_device(given.device) == "cuda" else given.stages
    if given.stages > gpus:
        raise HeadraceError(f"--stages {given.stages}: this machine has {gpus} GPUs, one a stage")
    if work.local and given.stages > 1:
        raise HeadraceError("--local runs one stage in this process: leave --stages out")
    if work.tier in ("device", "nvme") and given.host_memory:
        raise HeadraceError(
            f"--tier {work.tier} has no weights in host memory: leave --host-memory out"
        )
    if work.tier == "device" and given.resident_layers is not None:
        raise HeadraceError("--tier device keeps every layer: leave --resident-layers out")
    if not directory.is_dir():
        raise HeadraceError(f"--directory {directory} is not a directory: make it first")
    if work.tier == "nvme" and (kind := _filesystem(directory)) in ("tmpfs", "ramfs"):
        raise HeadraceError(
            f"{directory} is in memory ({kind}) and not on a drive: name a --directory on the drive "
            "that is to be measured"
        )


def _filesystem(directory: Path) -> str:
    found = [
        (len(Path(place.mountpoint).parts), place.fstype)
        for place in psutil.disk_partitions(all=True)
        if directory.resolve().is_relative_to(place.mountpoint)
    ]
    return max(found)[1] if found else ""


def _check_host_memory(layers: Sequence[int]) -> None:
    free = available_memory()
    if sum(layers) > free:
        fitting = max(1, free * len(layers) // sum(layers))
        raise HeadraceError(
            f"the {len(layers)} layers take {format_size(sum(layers))} of pinned host memory and "
            f"{format_size(free)} is free: use --layers {fitting} or --tier nvme"
        )


def options_of(given: EngineOptions, work: Work, store: Store) -> EngineOptions:
    """The engine's options for `work`; what was given stands. Raises DoesNotFitError."""
    options = replace(
        given,
        store=store.path,
        context=given.context or work.context,
        min_sequences=work.batch or given.min_sequences,
    )
    if work.tier != "auto":
        options = replace(options, **_tier(given, work.tier, store))
    if work.tier == "device" and any(local_plan(options, store).expert_slots):
        raise HeadraceError(
            "--tier device keeps every layer with its experts, which do not fit: use fewer --layers, "
            "more --device-memory or another --tier"
        )
    if options.max_sequences is not None:
        return options
    most = work.batch or MOST_SEQUENCES
    # Contiguous stages have a pass each in flight, which share the sequences.
    groups = local_plan(replace(options, max_sequences=most), store).passes_in_flight
    return replace(options, max_sequences=-(-most // groups))


def _tier(given: EngineOptions, tier: str, store: Store) -> dict[str, Any]:
    if tier == "device":
        return {"host_memory": given.kv_host_bytes, "resident_layers": len(store.layers)}
    host = given.kv_host_bytes
    if tier == "host":
        host = _host_bytes(store) + host if given.host_memory is None else given.host_memory
    return {"host_memory": host, "resident_layers": given.resident_layers or 0}


def _host_bytes(store: Store) -> int:
    """What holds all layers in host memory, whole or split."""
    shape = model_shape(store, "float32")
    experts = num_experts(shape, range(shape.num_layers)) * shape.expert_bytes
    return max(sum(shape.layer_bytes), sum(shape.held_bytes(split=True)) + experts)


def batch_of(plan: Plan, work: Work) -> int:
    """How many sequences run at once. HeadraceError when the plan has no KV for that many."""
    guests = plan.prediction.guests
    on_device = plan.num_pages - guest_pages(guests)
    room = on_device * PAGE_TOKENS // work.context + guests
    room = min(room, plan.max_sequences * plan.passes_in_flight, plan.num_tails or room)
    if room < (work.batch or 1):
        raise HeadraceError(
            f"the plan has KV for {room} sequences of {work.prompt} + {work.new} tokens at once: "
            f"use --batch {room} or more memory"
        )
    return work.batch or min(room, MOST_SEQUENCES)


def run_work(given: EngineOptions, work: Work, store: Store) -> Result:
    """Measures the machine, then runs. Raises HeadraceError."""
    options = options_of(given, work, store)
    device = resolve_device(options.device)
    blocks, largest = store.layers, max(block.nbytes for block in store.layers)
    with ExitStack() as stack:
        hop = Hop(0.0, 1.0)  # a single stage has none
        if options.stages > 1:
            stack.enter_context(ray_cluster(options.stages, None))
            with hop_actors(device) as actors:
                hop = measure_hop(actors)
        disk = disk_gbps(blocks, BRIEFLY)
        profile = measure_profile(device, options.stages, disk, largest, hop)
        meter = DeviceMeter()
        started = time.perf_counter()
        engine = stack.enter_context(_open_engine(work, options))
        ready = time.perf_counter() - started
        engine.wait_host_tier()
        if options.ngram_speculation:
            engine.draft_with(BlindDrafter)
        batch, driver = batch_of(engine.plan, work), Driver(engine, meter)
        _generate(driver, min(WARMUP_SEQUENCES, batch), work.prompt, WARMUP_TOKENS, store, seed=1)
        driver.steps.clear()
        _generate(driver, batch, work.prompt, work.new, store)
        meter.sample()
        plan, kv, logs = engine.plan, engine.stats.kv, engine.log_reports()
    found = steady(driver.steps, batch, plan.passes_in_flight)
    if sum(plan.nvme_bytes_a_pass):
        # A drive's speed drifts, and a bound is the best that it did.
        profile = replace(profile, nvme_gbps=max(profile.nvme_gbps, disk_gbps(blocks)))
    shape = shape_in(store, resolve_dtype(options.dtype, device, store), options.kv_format)
    measured = Measured(plan, shape, profile, batch, found)
    return Result(
        plan=plan,
        batch=batch,
        profile=profile,
        prefill=measured.prefill(work.prompt),
        decode=measured.decode(work.prompt + work.new // 2),
        rounds=len(found.rounds),
        stages=found.stages,
        start_seconds=ready,
        peak_device_bytes=meter.most,
        kv=kv,
        logs=logs,
        drafts=found.drafts,
    )


def _open_engine(work: Work, options: EngineOptions) -> AbstractContextManager[Engine]:
    return local_engine(options) if work.local else running_engine(options)


def _generate(
    driver: Driver, count: int, prompt: int, new: int, store: Store, *, seed: int = 0
) -> None:
    """Sequences of another seed share no prefix with these, whose pages would be found."""
    driver.add(random_prompts(count, prompt, store.config["vocab_size"], seed=seed), new)
    driver.run()


def run_profile(given: EngineOptions, work: Work, store: Store, trace: Path) -> Breakdown:
    """Two passes of decodes only, by one stage in this thread; the trace goes to a file."""
    with local_engine(options_of(given, work, store), InlinePipeline) as engine:
        engine.wait_host_tier()
        driver, batch = Driver(engine), batch_of(engine.plan, work)
        driver.add(random_prompts(batch, work.prompt, store.config["vocab_size"]), work.new)
        while driver.step().drew < batch:
            if not engine.has_work:
                raise HeadraceError("no pass decodes all sequences; give more --new tokens")
        driver.step()
        return profile_passes(driver.step, PROFILED_PASSES, trace)
