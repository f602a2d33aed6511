"""How long a hop between two stages takes, and a Ray call: measured between two actors of our own."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch

from headrace.cluster.edges import loopback
from headrace.cluster.pipeline import gather
from headrace.cluster.processes import START_SECONDS, ray_cluster
from headrace.runtime.link_speed import LinkEnd
from headrace.runtime.rendezvous import Rendezvous, RendezvousServer

ROW = 8192
"""Elements of a row of hidden states, in bfloat16."""

SMALL, LARGE = 1, 512
ROUNDS = 20
CALLS = 100
DEADLINE = 60.0


@dataclass(frozen=True, slots=True)
class Hop:
    """One way: seconds until a small message is there, and GB/s of what a large one adds."""

    seconds: float
    gbps: float


class HopActor:
    """One of two processes that send hidden states to and fro over the product's own links."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def echo(self) -> None:
        """What a Ray call takes."""

    def connect(self, stage: int, host: str, port: int, interface: str, epoch: int = 0) -> None:
        """Be one end, 0 or 1, of a pair that has the epoch to itself."""
        place = Rendezvous(host, port, epoch), self._device, interface
        self._link = LinkEnd(stage, *place, rows=LARGE, width=ROW)

    def disconnect(self) -> None:
        self._link.close()

    def exchange(self, rows: int) -> float:
        """Seconds of one way, over ROUNDS ways there and back."""
        self._link.volley(rows, 3)
        return self._link.volley(rows, ROUNDS)[0]


@contextmanager
def hop_actors(device: str) -> Iterator[list[Any]]:
    """Two connected actors on a Ray cluster, each with a GPU of its own on "cuda"."""
    with ExitStack() as stack:
        stack.enter_context(ray_cluster(2, None))
        remote = ray.remote(HopActor)
        gpus = 1 if device == "cuda" else 0
        actors: list[Any] = []
        for _ in range(2):
            actor = remote.options(num_cpus=1, num_gpus=gpus).remote("cuda:0" if gpus else "cpu")
            stack.callback(ray.kill, actor)
            actors.append(actor)
        server = RendezvousServer("127.0.0.1")
        stack.callback(server.close)
        place = server.host, server.port, loopback()
        refs = [actor.connect.remote(stage, *place) for stage, actor in enumerate(actors)]
        gather(refs, START_SECONDS, doing="connecting two processes")
        yield actors


def measure_hop(actors: list[Any]) -> Hop:
    """Raises StageError when a process dies or does not answer."""
    seconds = []
    for rows in (SMALL, LARGE):
        refs = [actor.exchange.remote(rows) for actor in actors]
        seconds.append(max(gather(refs, DEADLINE, doing="measuring hops")))
    extra = (LARGE - SMALL) * ROW * torch.bfloat16.itemsize
    return Hop(seconds[0], extra / max(seconds[1] - seconds[0], 1e-9) / 1e9)


def measure_call(actors: list[Any]) -> float:
    """Seconds of a Ray call that does nothing."""
    ray.get(actors[0].echo.remote())
    started = time.perf_counter()
    for _ in range(CALLS):
        ray.get(actors[0].echo.remote())
    return (time.perf_counter() - started) / CALLS
