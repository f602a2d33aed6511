"""Edges over real Gloo sockets: order under random delays, and what a dead peer looks like."""

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from headrace.runtime.link import Receiver, ReceiveRing, Sender, connect
from headrace.runtime.rendezvous import RendezvousServer, edge_group
from headrace.scheduler.errors import StageError, StageLostError
from headrace.scheduler.placement import Placement, Tier, cyclic_visits

CPU = torch.device("cpu")
HIDDEN = 8
MICRO_BATCHES = 4
Ends = tuple[dict[int, Sender], dict[int, Receiver]]


@contextmanager
def ring(placement: Placement, deadline: float = 20.0) -> Iterator[list[Ends]]:
    """Every stage's ends, as threads of one process that meet over loopback sockets."""
    server = RendezvousServer("127.0.0.1")

    def open_ends(stage: int) -> Ends:
        buffers = ReceiveRing(MICRO_BATCHES + 1, 16, HIDDEN, torch.float32, CPU)
        return connect(
            stage,
            placement.edges,
            server.rendezvous(epoch=0),
            ring=buffers,
            device=CPU,
            deadline=deadline,
            interface="lo",
        )

    with ThreadPoolExecutor(placement.num_stages) as threads:
        ends = list(threads.map(open_ends, range(placement.num_stages)))
        try:
            yield ends
        finally:
            for senders, receivers in ends:
                for end in (*senders.values(), *receivers.values()):
                    end.close()
            server.close()


def placement_of(stages: int, layers: int = 12) -> Placement:
    return Placement(stages, cyclic_visits(layers, stages, 1), (Tier.DEVICE,) * layers)


def travel(placement: Placement, stage: int, ends: Ends, seed: int, passes: int) -> int:
    """What Stage.run does with its links: each visit adds one; returns micro-batches checked."""
    senders, receivers = ends
    rng = random.Random(seed)
    checked = 0
    for step in range(passes):
        for visit in placement.visits_of(stage):
            for batch in range(MICRO_BATCHES):
                tokens = 1 + (step + batch) % 16
                x = torch.full((tokens, HIDDEN), 100.0 * batch)
                if visit:
                    x = receivers[placement.visits[visit - 1].stage].recv(tokens)
                    assert torch.equal(x, torch.full_like(x, 100.0 * batch + visit))
                    checked += 1
                time.sleep(rng.choice([0.0, 0.0, 0.002]))
                if visit + 1 < len(placement.visits):
                    senders[placement.visits[visit + 1].stage].send(x + 1)
    return checked


@pytest.mark.parametrize("stages", [2, 3])
def test_a_cycle_never_blocks_whatever_the_delays(stages: int) -> None:
    placement = placement_of(stages)
    with ring(placement) as ends, ThreadPoolExecutor(stages) as threads:
        done = [
            threads.submit(travel, placement, stage, ends[stage], stage, 6)
            for stage in range(stages)
        ]
        checked = sum(future.result(timeout=60) for future in done)
        kept = [len(sender._queued) for senders, _ in ends for sender in senders.values()]  # type: ignore[attr-defined]
    assert kept and max(kept) <= MICRO_BATCHES + 1
    assert checked == 6 * MICRO_BATCHES * (placement.num_layers - 1)


def test_a_peer_that_is_gone_is_an_error_at_once() -> None:
    with ring(placement_of(2)) as ends:
        for end in (*ends[1][0].values(), *ends[1][1].values()):
            end.close()
        started = time.monotonic()
        with pytest.raises(StageError, match="edge 1 -> 0 broke"):
            ends[0][1][1].recv(4)
        assert time.monotonic() - started < 10


def test_a_peer_that_hangs_is_an_error_at_the_deadline() -> None:
    with ring(placement_of(2), deadline=0.5) as ends, pytest.raises(StageError, match="broke"):
        ends[0][1][1].recv(4)


def test_nobody_waits_for_a_meeting_that_is_over() -> None:
    """Such as a stage that is told to connect when another one has died again."""
    server = RendezvousServer("127.0.0.1")
    rendezvous = server.rendezvous(3)
    server.close()
    started = time.monotonic()
    with pytest.raises(StageLostError, match=r"did not reach stage 1.*: nobody meets at 127"):
        edge_group(rendezvous, (0, 1), 0, torch.device("cpu"), "")
    assert time.monotonic() - started < 5
