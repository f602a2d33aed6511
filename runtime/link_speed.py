"""How fast hidden states get from one process to another, over the product's own links."""

import time
from types import TracebackType
from typing import Self

import torch

from headrace.runtime.link import ReceiveRing, connect
from headrace.runtime.rendezvous import Rendezvous
from headrace.scheduler.links import Hop

EDGES = ((0, 1), (1, 0))
DEADLINE = 60.0
WARM = 3

WIDTH, LARGE = 256, 2048
"""Elements of a row in bfloat16, which is a message of half a KiB, and rows of a MiB."""

SMALL_ROUNDS, MOST_ROUNDS = 8, 20
SECONDS = 0.5
"""About as long as MiBs go to and fro, beside the first ones, in which TCP gets up to speed."""


class LinkEnd:
    """End 0 or 1 of a link that is as two stages would have it, for messages of up to `rows` x `width`
    elements in bfloat16. StageLostError when the other end does not come, or is gone."""

    def __init__(
        self,
        end: int,
        rendezvous: Rendezvous,
        device: torch.device,
        interface: str,
        *,
        rows: int,
        width: int,
    ) -> None:
        self._end, self._device, self._width = end, device, width
        ring = ReceiveRing(4, rows, width, torch.bfloat16, device)
        senders, receivers = connect(
            end, EDGES, rendezvous, ring=ring, device=device, deadline=DEADLINE, interface=interface
        )
        self._sender, self._receiver = senders[1 - end], receivers[1 - end]

    def volley(self, rows: int, rounds: int, value: float = 0.0) -> tuple[float, float]:
        """Seconds of one way, over so many there and back, and the value that end 0 sent.

        Each message is the one that came, so that a device waits where the host does not.
        """
        shape = rows, self._width
        x = torch.full(shape, value, dtype=torch.bfloat16, device=self._device)
        started = time.perf_counter()
        for _ in range(rounds):
            if self._end == 0:
                self._sender.send(x)
                x = self._receiver.recv(rows)
            else:
                x = self._receiver.recv(rows)
                self._sender.send(x)
        said = float(x[0, 0])  # waits for the device
        return (time.perf_counter() - started) / rounds / 2, said

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.close()


def measure_link(
    end: int, rendezvous: Rendezvous, device: torch.device, interface: str = ""
) -> Hop:
    """The way between two processes that call this at the same time, as ends 0 and 1: about a second.

    One way is taken to be half of there and back. StageLostError when the other end does not answer.
    """
    with LinkEnd(end, rendezvous, device, interface, rows=LARGE, width=WIDTH) as link:
        link.volley(1, WARM)
        small, _ = link.volley(1, SMALL_ROUNDS)
        first, _ = link.volley(LARGE, 1)
        # End 0 decides for both. Whole numbers up to 256 are exact in bfloat16.
        wanted = float(min(MOST_ROUNDS, max(1, int(SECONDS / (2 * first)))))
        _, rounds = link.volley(1, 1, wanted)
        large, _ = link.volley(LARGE, int(rounds))
        nbytes = (LARGE - 1) * WIDTH * torch.bfloat16.itemsize
        return Hop(small, nbytes / max(large - small, 1e-9) / 1e9)
