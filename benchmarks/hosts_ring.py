"""What runs on the first of the emulated hosts: rings over all of them, driven pass by pass (see hosts.py).

It prints a JSON object a line: {"at": seconds of the machine's monotonic clock, "what": ..., ...}.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headrace.cluster.bench.driver import Driver, random_prompts, steady
from headrace.cluster.engine import Engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.launch import running_engine
from headrace.cluster.processes import ray_cluster
from headrace.runtime.store import Store
from headrace.scheduler.expectation import plan_seconds
from headrace.scheduler.request import SamplingParams

MIB = 1 << 20
SEQUENCES, PROMPT = 4, 24


def say(what: str, **more: Any) -> None:
    print(json.dumps({"at": time.monotonic(), "what": what, **more}), flush=True)


class Warnings(logging.Handler):
    """What the engine tells its user, with the time."""

    def emit(self, record: logging.LogRecord) -> None:
        say("told", text=record.getMessage())


def options_of(given: argparse.Namespace, split: Sequence[int] | None = None) -> EngineOptions:
    return EngineOptions(
        store=given.store,
        stages=3,
        device="cpu",
        device_memory=given.memory * MIB,
        storage="direct",
        context=PROMPT + given.new,
        max_sequences=SEQUENCES,
        address=given.address,
        interface=given.interface,
        rendezvous_port=given.rendezvous_port,
        heartbeat_timeout=given.heartbeat_timeout,
        pass_timeout=given.pass_timeout,
        stage_layers=None if split is None else tuple(split),
    )


def prompts(given: argparse.Namespace, seed: int = 0) -> list[list[int]]:
    vocabulary = Store.open(given.store).config["vocab_size"]
    return random_prompts(SEQUENCES, PROMPT, vocabulary, seed=seed)


def answers(engine: Engine, given: argparse.Namespace) -> list[list[int]]:
    """All tokens; a line for each pass that gave some."""
    params = SamplingParams(max_tokens=given.new, temperature=0.0, ignore_eos=True)
    ids = [engine.add(prompt, params, seed=i) for i, prompt in enumerate(prompts(given))]
    done: dict[int, list[int]] = {}
    while engine.has_work:
        before = engine.stats.output_tokens
        done |= {one.request_id: one.token_ids for one in engine.step()}
        if engine.stats.output_tokens > before:
            say("tokens", count=engine.stats.output_tokens)
    return [done[request] for request in ids]


def one_host(given: argparse.Namespace) -> None:
    """The same tokens from one process of this host, with room for all."""
    options = EngineOptions(
        store=given.store, device="cpu", context=PROMPT + given.new, max_sequences=SEQUENCES
    )
    with running_engine(options) as engine:
        say("answers", tokens=answers(engine, given))


def ring(given: argparse.Namespace) -> None:
    with running_engine(options_of(given)) as engine:
        told = Warnings(logging.WARNING)
        logging.getLogger("headrace").addHandler(told)
        assert engine.inputs is not None
        say("ready", nodes=engine.inputs.nodes, layers=layers(engine))
        say("answers", tokens=answers(engine, given))
        say("recoveries", found=[asdict(one) for one in engine.stats.recoveries])


def layers(engine: Engine) -> list[int]:
    placement = engine.plan.placement
    return [len(placement.layers_of(stage)) for stage in range(placement.num_stages)]


def splits(given: argparse.Namespace) -> None:
    """Passes of the planner's split and of an even one, in turns of their rings."""
    count = len(Store.open(given.store).layers)
    even = [count // 3 + (i < count % 3) for i in range(3)]
    with ray_cluster(3, given.address):
        for _ in range(given.turns):
            for name, split in (("planned", None), ("even", even)):
                with running_engine(options_of(given, split)) as engine:
                    say("split", name=name, **measured(engine, given))


def measured(engine: Engine, given: argparse.Namespace) -> dict[str, Any]:
    driver = Driver(engine)
    driver.add(prompts(given, seed=1), 2)
    driver.run()
    driver.steps.clear()
    driver.add(prompts(given), given.new)
    driver.run()
    found = steady(driver.steps, SEQUENCES, engine.plan.passes_in_flight)
    inputs, plan = engine.inputs, engine.plan
    assert inputs is not None
    context = PROMPT + given.new // 2
    machines = inputs.profiles, inputs.links
    expected = plan_seconds(plan, inputs.shape, *machines, SEQUENCES, context)
    return {
        "layers": layers(engine),
        "nodes": inputs.nodes,
        "drives": [profile.nvme_gbps for profile in inputs.profiles],
        "hops": [asdict(inputs.links.between(i, (i + 1) % 3)) for i in range(3)],
        "bound_by": plan.prediction.bound_by,
        "expected": expected,
        "rounds": list(found.rounds),
        "median": statistics.median(found.rounds),
    }


ROLES = {"one-host": one_host, "ring": ring, "splits": splits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("store", type=Path)
    parser.add_argument("--address")
    parser.add_argument("--interface")
    parser.add_argument("--rendezvous-port", type=int, default=0)
    parser.add_argument("--memory", type=int, default=84, help="MiB a stage")
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--heartbeat-timeout", type=float, default=5.0)
    parser.add_argument("--pass-timeout", type=float, default=30.0)
    given = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    ROLES[given.role](given)


if __name__ == "__main__":
    main()
