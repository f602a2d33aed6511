"""Kills and stops what a ring that is generating is made of, at random instants, and times how it recovers.

Stages, `node` one of three nodes (processes of this machine), `driver` the process that owns the job. Every
answer is compared with an undisturbed run's. `--soak` kills a random stage every `--every` seconds for so
many seconds instead, and watches the driver's memory.

    python benchmarks/recovery.py STORE --stages 3 --device-memory 24MiB --instants 20
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster
from recovery_driver import kill_drivers

from headrace.cluster.cli.sizes import parse_size
from headrace.cluster.engine import Engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.launch import running_engine
from headrace.scheduler.request import SamplingParams


@dataclass(frozen=True)
class Load:
    """Prompts of random tokens, answered all at once."""

    prompts: list[list[int]]
    params: list[SamplingParams]

    @classmethod
    def random(cls, sequences: int, prompt: int, new: int, vocabulary: int) -> "Load":
        rng = random.Random(0)
        prompts = [
            [rng.randrange(10, vocabulary) for _ in range(rng.randint(prompt // 2, prompt))]
            for _ in range(sequences)
        ]
        kinds = [SamplingParams(temperature=t, max_tokens=new, ignore_eos=True) for t in (0.0, 0.8)]
        return cls(prompts, [kinds[i % 2] for i in range(sequences)])

    def run(self, engine: Engine, tenant: str) -> list[list[int]]:
        """The tokens of each; nothing is found of what another tenant had computed."""
        ids = [
            engine.add(tokens, params, seed=i, tenant=tenant)
            for i, (tokens, params) in enumerate(zip(self.prompts, self.params, strict=True))
        ]
        done: dict[int, list[int]] = {}
        while engine.has_work:
            done |= {completion.request_id: completion.token_ids for completion in engine.step()}
        return [done[request_id] for request_id in ids]


@contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


NAMES = ("first", "middle", "last", "stopped", "two", "during", "node", "driver")


class Scenario:
    """What is done to stages, `delay` seconds from now. `name` is one of NAMES, or "node" with a cluster."""

    def __init__(
        self, name: str, engine: Engine, rng: random.Random, cluster: Cluster | None
    ) -> None:
        self._name, self._engine, self._rng, self._cluster = name, engine, rng, cluster

    def __call__(self, delay: float) -> None:
        pids, rng = self._engine.stage_pids(), self._rng
        before = self._engine.stats.num_recoveries
        time.sleep(delay)
        last = len(pids) - 1
        if self._cluster is not None:
            self._kill_node(self._cluster, pids)
        elif self._name in ("first", "middle", "last"):
            send(pids[{"first": 0, "middle": last // 2, "last": last}[self._name]], signal.SIGKILL)
        elif self._name == "stopped":
            send(rng.choice(pids), signal.SIGSTOP)
        elif self._name == "two":
            for pid in rng.sample(pids, 2):
                send(pid, signal.SIGKILL)
        else:
            victim = rng.randrange(len(pids))
            send(pids[victim], signal.SIGKILL)
            self._kill_another(pids, victim, before)

    def _kill_node(self, cluster: Cluster, pids: list[int]) -> None:
        """The raylet of one that has stages, and is not the head, with all that it started."""
        raylets = {
            node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes
        }
        used = {psutil.Process(pid).ppid() for pid in pids} & raylets.keys()
        cluster.remove_node(raylets[self._rng.choice(sorted(used))], allow_graceful=False)

    def _kill_another(self, pids: list[int], victim: int, before: int) -> None:
        """A second one, while the first is being replaced: a survivor, or the new process itself."""
        end = time.monotonic() + self._rng.uniform(0.0, 8.0)
        other = self._rng.choice(range(len(pids)))
        while time.monotonic() < end and self._engine.stats.num_recoveries == before:
            time.sleep(0.02)
        pid = self._engine.stage_pids()[other] if other == victim else pids[other]
        if pid and pid != pids[victim]:
            send(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Case:
    """One disturbance: how long all answers took beside `undisturbed`, and what was recovered. `grown` is the most
    host memory, in bytes, that a process which stayed holds more than before."""

    scenario: str
    same: bool
    kept: bool
    grown: int
    recoveries: int
    phases: dict[str, float]
    noticed: float


def resident(pids: list[int]) -> dict[int, int]:
    """Bytes of host memory that each of these processes of this machine holds, if it lives."""
    found = {}
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found[pid] = psutil.Process(pid).memory_info().rss
    return found


def disturb(
    engine: Engine,
    load: Load,
    want: list[list[int]],
    name: str,
    rng: random.Random,
    seconds: float,
    cluster: Cluster | None,
) -> Case:
    scenario, before = Scenario(name, engine, rng, cluster), engine.stats.num_recoveries
    pids = engine.stage_pids()
    held = resident(pids)
    started = time.monotonic()
    delay = rng.uniform(0.05, 0.9) * seconds
    with beside(lambda: scenario(delay)):
        found = load.run(engine, f"{name} {rng.random()}")
    took = time.monotonic() - started
    made = engine.stats.num_recoveries - before
    recoveries = list(engine.stats.recoveries)[len(engine.stats.recoveries) - made :]
    phases: dict[str, float] = {}
    replaced: set[int] = set()
    for recovery in recoveries:
        replaced.update(recovery.stages)
        for phase, spent in recovery.phases.items():
            phases[phase] = phases.get(phase, 0.0) + spent
    same = [a == b for a, b in zip(pids, engine.stage_pids(), strict=True)]
    kept = all(is_same for stage, is_same in enumerate(same) if stage not in replaced)
    stayed = resident([pid for pid, is_same in zip(pids, same, strict=True) if is_same])
    growth = (size - held[pid] for pid, size in stayed.items() if pid in held)
    noticed = took - seconds - sum(phases.values())
    return Case(name, found == want, kept, max(growth, default=0), made, phases, noticed)


def table(cases: list[Case], undisturbed: float) -> str:
    names = ["breaking off", "starting", "loading", "connecting"]
    lines = [
        f"undisturbed: {undisturbed:.1f} s. Seconds are medians (most).",
        f"{'scenario':10} {'cases':>5} {'same':>5} {'kept':>5} {'grew, MB':>8} {'recov.':>6}"
        + "".join(f"{name:>18}" for name in [*names, "noticed, again"]),
    ]
    for scenario in dict.fromkeys(case.scenario for case in cases):
        some = [case for case in cases if case.scenario == scenario]
        hit = [case for case in some if case.recoveries]
        columns = [[case.phases.get(name, 0.0) for case in hit] for name in names]
        columns.append([case.noticed for case in hit])
        cells = "".join(
            f"{f'{statistics.median(c):.2f} ({max(c):.2f})' if c else '-':>18}" for c in columns
        )
        lines.append(
            f"{scenario:10} {len(some):5} {sum(c.same for c in some):5} {sum(c.kept for c in some):5}"
            f" {max(c.grown for c in some) / 1e6:8.0f} {sum(c.recoveries for c in some):6}{cells}"
        )
    return "\n".join(lines)


def soak(engine: Engine, load: Load, want: list[list[int]], seconds: float, every: float) -> bool:
    """Whether all answers were the same, and memory stayed where it was."""
    rng, end, done, wrong = random.Random(1), time.monotonic() + seconds, threading.Event(), 0
    kills = runs = 0
    memory: list[int] = []

    def kill() -> None:
        nonlocal kills
        while not done.wait(every):
            # A process that is still to start has no id yet.
            if pid := rng.choice(engine.stage_pids()):
                send(pid, rng.choice([signal.SIGKILL, signal.SIGSTOP]))
                kills += 1
            memory.append(psutil.Process().memory_info().rss)

    with beside(kill):
        while time.monotonic() < end:
            runs += 1
            wrong += load.run(engine, f"soak {runs}") != want
        done.set()
    used = engine.stats.kv.device.used
    print(
        f"soak: {kills} kills and stops, {engine.stats.num_recoveries} recoveries, {runs} runs of"
        f" {len(want)} sequences, {wrong} with other tokens; pages held at the end: {used}; the driver's"
        f" memory {memory[0] / 1e6:.0f} MB after the first, {memory[-1] / 1e6:.0f} MB after the last"
    )
    return not wrong and not used


@contextmanager
def nodes(name: str) -> Iterator[Cluster | None]:
    """Three for the scenario "node", each with room for two stages; else stages are on this machine alone."""
    if name != "node":
        yield None
        return
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    cluster = Cluster(True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def kill_stages(options: EngineOptions, given: argparse.Namespace, names: list[str]) -> bool:
    """Whether all answers were the same. `names` are "node" alone, or none of it."""
    with nodes(names[0]) as cluster, running_engine(options) as engine:
        load = Load.random(given.sequences, given.prompt, given.new, len(engine.tokenizer))
        want = load.run(engine, "warm")
        started = time.monotonic()
        assert load.run(engine, "again") == want, "two undisturbed runs differ"
        undisturbed = time.monotonic() - started
        if given.soak:
            return soak(engine, load, want, given.soak, given.every)
        rng, cases = random.Random(0), []
        for name in names:
            for _ in range(given.instants):
                cases.append(disturb(engine, load, want, name, rng, undisturbed, cluster))
                print(cases[-1], file=sys.stderr, flush=True)
                if cluster is not None and len(cluster.worker_nodes) < 2:
                    cluster.add_node(num_cpus=2)
    print(table(cases, undisturbed))
    if given.json is not None:
        given.json.write_text(json.dumps([vars(case) for case in cases], indent=1))
    return all(case.same and case.kept for case in cases)


def kill_jobs(given: argparse.Namespace) -> bool:
    """Whether all rows were the same."""
    options = [str(given.store), "--stages", str(given.stages), "--device", given.device]
    if given.device_memory is not None:
        options += ["--device-memory", str(given.device_memory)]
    options += ["--context", str(given.prompt + given.new), "--max-tokens", str(given.new)]
    options += ["--max-sequences", str(given.sequences // 2), "--temperature", "0.8"]
    cases = kill_drivers(options, given.sequences * 2, given.instants, random.Random(0))
    longer = [case.longer for case in cases]
    print(
        f"driver: {len(cases)} killed, {sum(case.same for case in cases)} with the same rows,"
        f" {sum(case.rows > 0 for case in cases)} after their first row; all of it took"
        f" {statistics.median(longer):.1f} s ({max(longer):.1f}) longer"
    )
    return all(case.same for case in cases)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device-memory", type=parse_size)
    parser.add_argument("--host-memory", type=parse_size)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=120)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--instants", type=int, default=20)
    parser.add_argument("--scenarios", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--heartbeat-timeout", type=float, default=10.0)
    parser.add_argument("--soak", type=float, default=0.0)
    parser.add_argument("--every", type=float, default=30.0)
    parser.add_argument("--json", type=Path, help="of stages and nodes")
    given = parser.parse_args()
    options = EngineOptions(
        store=given.store,
        stages=given.stages,
        device=given.device,
        dtype=given.dtype,
        device_memory=given.device_memory,
        host_memory=given.host_memory,
        context=given.prompt + given.new,
        max_sequences=given.sequences,
        heartbeat_timeout=given.heartbeat_timeout,
    )
    ring = [name for name in given.scenarios if name not in ("node", "driver")]
    nodes_too = [name for name in given.scenarios if name == "node"]
    fine = [kill_stages(options, given, names) for names in (ring, nodes_too) if names]
    if "driver" in given.scenarios:
        fine.append(kill_jobs(given))
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
