"""Hidden states between stages: one two-rank process group per directed edge.

Why no wait is circular. All transfers of a run have one global order: by pass, then visit, then
micro-batch. Every stage works through its own part of that order, and who sends and who receives
follows from the pass and the placement, which all stages share. A receive waits only for a send that
precedes it in the global order, and a pass that follows another for the tokens that this one drew, at
the end of its part. A send is queued and the sender goes on, but waits until the send before the last
few has been received: there are more of these than micro-batches in a pass, so that the receive belongs
to an earlier visit or pass and precedes the send, too. So the earliest unfinished operation can always
proceed, also around the wrap-around edge of a cycle, and few buffers are held.

Each operation has a deadline; a peer that does not answer in time is a StageLostError, never a hang. What
is under way can be broken off from another thread at any time: then both ends fail at once.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from headrace.runtime.memory.held import Holding, named
from headrace.runtime.rendezvous import Rendezvous, edge_group
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer
from headrace.scheduler.errors import StageLostError

_NEVER_SENT = 0x7FFFFFFF
"""A tag of no message."""


class Sender(Protocol):
    """The near end of an edge that carries hidden states to another stage."""

    def send(self, x: torch.Tensor) -> None:
        """Queue `x` [tokens, hidden], then wait for a send before it. `x` must not be written to
        afterwards."""

    def abort(self) -> None:
        """Have every operation fail, here and at the other end, also those under way. Any thread."""

    def memory(self) -> Iterable[Holding]:
        """What is kept that may be on its way."""

    def close(self) -> None: ...


class Receiver(Protocol):
    """The far end of an edge."""

    def recv(self, num_tokens: int) -> torch.Tensor:
        """The next hidden states [num_tokens, hidden], valid until `depth` further receives."""

    def abort(self) -> None:
        """As of a sender."""

    def memory(self) -> Iterable[Holding]:
        """The buffers, which several receivers may share."""

    def close(self) -> None: ...


class ReceiveRing:
    """Receive buffers used in turn: `depth` tensors of [max_tokens, hidden]."""

    def __init__(
        self, depth: int, max_tokens: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.depth = depth
        self._buffers = [
            torch.empty(max_tokens, hidden, dtype=dtype, device=device) for _ in range(depth)
        ]
        self._next = 0
        self._receives: deque[torch.cuda.Event] = deque()

    def await_free(self, stream: torch.cuda.Stream) -> None:
        """Have `stream` wait until the buffer that is next has been read, by the current stream.

        A buffer returns after `depth` receives. What read it was queued before the receive that
        followed its own, whose event is therefore what to wait for.
        """
        event = torch.cuda.Event()
        event.record()
        self._receives.append(event)
        if len(self._receives) == self.depth:
            stream.wait_event(self._receives.popleft())

    def memory(self) -> Iterator[Holding]:
        return named("received", self._buffers)

    def take(self, num_tokens: int) -> torch.Tensor:
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % self.depth
        return buffer[:num_tokens]


class _Edge:
    """What both ends share: the group, the message counter and the deadline."""

    def __init__(self, group: Any, edge: tuple[int, int], deadline: float, tracer: Tracer) -> None:
        self._group, self._edge, self._deadline = group, edge, timedelta(seconds=deadline)
        self._is_broken = False
        self._tracer, self._name = tracer, f"{edge[0]}->{edge[1]}"
        self._count = 0

    def _tag(self) -> int:
        self._count += 1
        return self._count % _NEVER_SENT

    def _span(self, kind: Kind, tag: int, x: torch.Tensor) -> AbstractContextManager[None]:
        return self._tracer.span(kind, self._name, tag, x.nbytes)

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        """torch's errors, of a peer that is gone or late, as ours."""
        if self._is_broken:
            raise StageLostError(f"edge {self._edge[0]} -> {self._edge[1]} was broken off")
        try:
            yield
        except RuntimeError as error:
            # Gloo goes on to guess why.
            said = str(error).splitlines()[0].partition(". This is typically")[0]
            raise StageLostError(
                f"edge {self._edge[0]} -> {self._edge[1]} broke: {said}"
            ) from error

    def _wait(self, work: Any) -> None:
        with self._breaking():
            work.wait(self._deadline)

    def abort(self) -> None:
        self._is_broken = True
        if (group := self._group) is not None:
            _abort(group)

    def close(self) -> None:
        """Dropping the last reference closes Gloo's sockets, so that the peer fails at once instead of at
        its deadline; NCCL has to be told."""
        self._is_broken = True
        group, self._group = self._group, None
        if group is not None and not _is_gloo(group):
            group.abort()


def _is_gloo(group: Any) -> bool:
    return isinstance(group, dist.ProcessGroupGloo)


def _abort(group: Any) -> None:
    """Fail all operations of a group.

    Gloo's own abort leaves a thread that waits where it is. But an operation that is late fails all
    others of its group, and closes the sockets: so one is made that nobody answers.
    """
    if not _is_gloo(group):
        group.abort()
        return
    with suppress(RuntimeError):
        nothing = torch.empty(1, dtype=torch.uint8)
        group.recv([nothing], 1 - group.rank(), _NEVER_SENT).wait(timedelta(milliseconds=1))


class _Sender(_Edge):
    """Keeps what is on its way: the last `window` sends, more than a pass has micro-batches."""

    def __init__(
        self, group: Any, edge: tuple[int, int], deadline: float, tracer: Tracer, window: int
    ) -> None:
        super().__init__(group, edge, deadline, tracer)
        self._window = window
        self._queued: deque[tuple[torch.Tensor, Any]] = deque()

    def memory(self) -> Iterator[Holding]:
        return named("sent", [x for x, _ in self._queued])

    def _keep(self, x: torch.Tensor, work: Any) -> None:
        self._queued.append((x, work))
        if len(self._queued) > self._window:
            self._wait(self._queued.popleft()[1])


class GlooSender(_Sender):
    """Sends from host memory."""

    def send(self, x: torch.Tensor) -> None:
        raw, tag = x.contiguous().view(torch.uint8), self._tag()
        with self._breaking(), self._span(Kind.SEND, tag, raw):
            work = self._group.send([raw], 1, tag)
        self._keep(raw, work)


class GlooReceiver(_Edge):
    """Receives into host memory."""

    def __init__(
        self,
        group: Any,
        edge: tuple[int, int],
        deadline: float,
        tracer: Tracer,
        ring: ReceiveRing,
    ) -> None:
        super().__init__(group, edge, deadline, tracer)
        self._ring = ring

    def memory(self) -> Iterator[Holding]:
        return self._ring.memory()

    def recv(self, num_tokens: int) -> torch.Tensor:
        x, tag = self._ring.take(num_tokens), self._tag()
        with self._span(Kind.RECV, tag, x):
            with self._breaking():
                work = self._group.recv([x.view(torch.uint8)], 0, tag)
            self._wait(work)
        return x


class NcclSender(_Sender):
    """Sends from device memory, ordered after the compute queued so far; the host does not wait."""

    def __init__(
        self, group: Any, edge: tuple[int, int], deadline: float, tracer: Tracer, window: int
    ) -> None:
        super().__init__(group, edge, deadline, tracer, window)
        self._watching: torch.cuda.Stream | None = None

    def send(self, x: torch.Tensor) -> None:
        x, tag = x.contiguous(), self._tag()
        with self._breaking():
            work = self._group.send([x], 1, 0)
            if self._tracer.on:
                self._watch(work, x, tag)
        self._keep(x, work)

    def _watch(self, work: Any, x: torch.Tensor, tag: int) -> None:
        """Time a transfer, from what was computed before it to its end, on a stream of its own."""
        self._watching = stream = self._watching or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self._span(Kind.SEND, tag, x):
            work.wait()

    def _wait(self, work: Any) -> None:
        # The stage's own deadline at the end of each pass bounds the device. Here the compute stream
        # waits, so that what was sent can be let go.
        with self._breaking():
            work.wait()


class NcclReceiver(_Edge):
    """Receives on a stream of its own, so that a transfer overlaps the compute before it."""

    def __init__(
        self,
        group: Any,
        edge: tuple[int, int],
        deadline: float,
        tracer: Tracer,
        ring: ReceiveRing,
    ) -> None:
        super().__init__(group, edge, deadline, tracer)
        self._ring = ring
        self._stream = torch.cuda.Stream()

    def memory(self) -> Iterator[Holding]:
        return self._ring.memory()

    def recv(self, num_tokens: int) -> torch.Tensor:
        self._ring.await_free(self._stream)
        x = self._ring.take(num_tokens)
        with self._breaking():
            with torch.cuda.stream(self._stream), self._span(Kind.RECV, self._tag(), x):
                work = self._group.recv([x], 0, 0)
                if self._tracer.on:
                    work.wait()  # so that the span ends when the transfer does
            work.wait()  # the compute stream waits, the host does not
        return x


def connect(
    stage: int,
    edges: Sequence[tuple[int, int]],
    rendezvous: Rendezvous,
    *,
    ring: ReceiveRing,
    device: torch.device,
    deadline: float,
    interface: str = "",
    tracer: Tracer = NULL_TRACER,
) -> tuple[dict[int, Sender], dict[int, Receiver]]:
    """Open this stage's ends of `edges`, in one order on all stages so that none waits in a circle.

    `ring` lends the receive buffers, one more than a pass has micro-batches, and as many sends are
    kept; `interface` names the network interface for Gloo, or "" for
    its default. Returns senders and receivers by peer stage.
    """
    senders: dict[int, Sender] = {}
    receivers: dict[int, Receiver] = {}
    on_device: AbstractContextManager[Any] = (
        torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    )
    with on_device:
        for edge in edges:
            source, target = edge
            if stage not in edge:
                continue
            group = edge_group(rendezvous, edge, int(stage == target), device, interface)
            cuda = device.type == "cuda"
            if stage == source:
                senders[target] = (NcclSender if cuda else GlooSender)(
                    group, edge, deadline, tracer, ring.depth
                )
            else:
                receivers[source] = (NcclReceiver if cuda else GlooReceiver)(
                    group, edge, deadline, tracer, ring
                )
    return senders, receivers


def wait_event(event: torch.cuda.Event, deadline: float, what: str) -> None:
    """Block until `event` has happened; StageLostError when it has not within `deadline` seconds."""
    end = time.monotonic() + deadline
    while not event.query():
        if time.monotonic() > end:
            raise StageLostError(f"{what} did not finish within {deadline:.0f} s")
        time.sleep(2e-5)  # a pass of a small model takes few milliseconds
