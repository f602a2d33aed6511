"""A stage's ends of the edges to other stages."""

from collections.abc import Iterator, Mapping

import torch

from headrace.runtime.link import Receiver, Sender
from headrace.runtime.memory.held import Holding
from headrace.runtime.streaming.streamer import wait_clock
from headrace.runtime.trace import Kind, Tracer


class StageLinks:
    """Sends and receives hidden states [tokens, hidden], by peer, and measures waits for them."""

    def __init__(self, device: torch.device, tracer: Tracer) -> None:
        self._senders: Mapping[int, Sender] = {}
        self._receivers: Mapping[int, Receiver] = {}
        self._clock, self._tracer = wait_clock(device), tracer

    def connect(self, senders: Mapping[int, Sender], receivers: Mapping[int, Receiver]) -> None:
        self._senders, self._receivers = senders, receivers

    def send(self, target: int, x: torch.Tensor) -> None:
        """`x` must not be written to afterwards."""
        self._senders[target].send(x)

    def recv(self, source: int, num_tokens: int) -> torch.Tensor:
        with self._clock.measure(), self._tracer.span(Kind.LINK_WAIT, number=source):
            return self._receivers[source].recv(num_tokens)

    def take_wait(self) -> float:
        """Seconds in `recv` since this was asked last."""
        return self._clock.take()

    def abort(self) -> None:
        """Have what is under way fail, at both ends. Any thread."""
        for sender in self._senders.values():
            sender.abort()
        for receiver in self._receivers.values():
            receiver.abort()

    def memory(self) -> Iterator[Holding]:
        for sender in self._senders.values():
            yield from sender.memory()
        for receiver in self._receivers.values():
            yield from receiver.memory()

    def close(self) -> None:
        """Close the ends, which no pass uses any more, with their buffers. Safe to call twice."""
        for sender in self._senders.values():
            sender.close()
        for receiver in self._receivers.values():
            receiver.close()
        self._senders, self._receivers = {}, {}
