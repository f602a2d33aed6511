"""Runs an engine for its memory: measures each process step by step, from its start to after a load."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.profile.account import Account, device_account, host_account
from headrace.cluster.profile.request import Done, Load
from headrace.cluster.wire import decode
from headrace.runtime.memory.message import Measured
from headrace.runtime.memory.process import measure_process, reset_peak
from headrace.runtime.store import Store
from headrace.runtime.streaming.page_cache import cached_share
from headrace.scheduler.placement import Plan

MEASURE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A process of the run, in bytes: what is shared counts once over the PSS of all."""

    name: str
    pid: int
    rss: int
    pss: int
    uss: int


@dataclass(frozen=True, slots=True)
class Profile:
    """`accounts` are the driver's and each stage's; `processes` all of this node's that belong to the run, and
    `cached` the bytes of the store that the page cache holds beside them."""

    plan: Plan
    done: Done
    accounts: tuple[Account, ...]
    processes: tuple[Neighbour, ...]
    cached: int


@dataclass
class _Marks:
    """What was measured of one process, by what it had just done."""

    found: list[tuple[str, Measured]] = field(default_factory=list)

    def add(self, name: str, measured: Measured) -> None:
        self.found.append((name, measured))


class _Stages:
    """The stages' processes, asked before they load and afterwards."""

    def __init__(self) -> None:
        self._actors: Sequence[Any] = ()
        self.marks: list[_Marks] = []

    def watch(self, actors: Sequence[Any]) -> None:
        self._actors = actors
        self.marks = [_Marks() for _ in actors]
        self.mark("Python, Ray and torch")
        self._ask(lambda actor: actor.import_models.remote(), "importing models' code")
        self.mark("models' code (transformers, ...)")

    def mark(self, name: str) -> None:
        for marks, measured in zip(self.marks, self.measure(), strict=True):
            marks.add(name, measured)

    def measure(self) -> list[Measured]:
        payloads = self._ask(lambda actor: actor.memory.remote(), "measuring memory")
        return [decode(payload, Measured) for payload in payloads]

    def reset_peaks(self) -> None:
        self._ask(lambda actor: actor.reset_peaks.remote(), "measuring memory")

    def _ask(self, call: Callable[[Any], Any], doing: str) -> list[Any]:
        from headrace.cluster.pipeline import gather

        return gather([call(actor) for actor in self._actors], MEASURE_SECONDS, doing=doing)


def profile_run(options: EngineOptions, load: Load) -> Profile:
    """Starts the engine, runs the load and measures. Raises HeadraceError."""
    store, driver, stages = Store.open(options.store), _Marks(), _Stages()
    with ExitStack() as stack:
        _start(driver, options, store, stack)
        from headrace.cluster.launch import running_engine
        from headrace.cluster.profile.load import run_load, work_of

        engine = stack.enter_context(running_engine(options, stages.watch))
        engine.wait_host_tier()
        stages.mark("objects of layers, links and threads")
        driver.add("plan, scheduler and engine", Measured(measure_process()))
        load = replace(load, context=load.context or options.context)
        work = work_of(engine, load, store.config["vocab_size"])
        driver.add("requests" + (" and grammars" if load.rows else ""), Measured(measure_process()))
        stages.reset_peaks()
        reset_peak()
        done = run_load(engine, work, load.seconds)
        last, here = stages.measure(), Measured(measure_process())
        processes = _processes(here, last)
        plan = engine.plan
    accounts = [host_account("driver", driver.found, here, None)]
    for i, (marks, measured) in enumerate(zip(stages.marks, last, strict=True)):
        memory = plan.memory[i]
        accounts.append(host_account(f"stage {i}, host", marks.found, measured, memory))
        on_device = device_account(f"stage {i}, {_device(measured)}", measured, memory)
        if on_device is not None:
            accounts.append(on_device)
    return Profile(plan, done, tuple(accounts), processes, _cached(store))


def _device(measured: Measured) -> str:
    return "" if measured.device is None else measured.device.name


def _start(driver: _Marks, options: EngineOptions, store: Store, stack: ExitStack) -> None:
    """What a run does in the driver before it has an engine, one after the other."""
    driver.add("Python and the command line", Measured(measure_process()))
    from headrace.cluster.processes import ray_cluster

    driver.add("Ray, imported", Measured(measure_process()))
    import headrace.runtime.model  # noqa: F401

    driver.add("torch and models' code", Measured(measure_process()))
    from headrace.cluster.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(store.path)
    driver.add("tokenizer", Measured(measure_process()))
    del tokenizer  # the engine opens its own, in the same memory
    stack.enter_context(ray_cluster(options.stages, options.address, options.metrics_port))
    driver.add("Ray, connected", Measured(measure_process()))


def _processes(driver: Measured, stages: Sequence[Measured]) -> tuple[Neighbour, ...]:
    names = {measured.process.pid: f"stage {i}" for i, measured in enumerate(stages)}
    names[driver.process.pid] = "driver"
    node = os.uname().nodename
    found = [
        Neighbour(
            names[one.process.pid],
            one.process.pid,
            one.process.rss,
            one.process.pss,
            one.process.uss,
        )
        for one in (driver, *stages)
        if one.process.node == node
    ]
    for process in psutil.Process().children(recursive=True):
        if process.pid in names:
            continue
        try:
            info = process.memory_full_info()
            found.append(Neighbour(_name(process), process.pid, info.rss, info.pss, info.uss))
        except psutil.Error:
            continue
    return tuple(found)


def _name(process: psutil.Process) -> str:
    words = process.cmdline()
    if not words:
        return str(process.name())
    program = os.path.basename(words[0])
    script = next((os.path.basename(w) for w in words[1:] if w.endswith(".py")), "")
    return f"Ray: {script or program}"


def _cached(store: Store) -> int:
    shares = [
        (block.nbytes, cached_share(block.file, block.data_offset, block.nbytes))
        for block in store.blocks
    ]
    return round(sum(nbytes * share for nbytes, share in shares if share is not None))
