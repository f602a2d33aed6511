"""What each resource of a stage did, and when: spans of time on the node's wall clock.

Whoever does work opens a span around it, of a SwitchTracer that is turned to a recorder (recorder.py) while
somebody wants a trace. At all other times it hands out one and the same empty context.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

KEPT_PASSES = 64
"""What a trace has of a run as a whole: its newest passes."""


class Kind(str, Enum):
    """What a span of time was spent on."""

    PASS = "pass"
    VISIT = "visit"
    WEIGHTS_WAIT = "wait for weights"
    LINK_WAIT = "wait for link"
    DEQUANT = "dequant"
    MATMUL = "matmul"
    ATTENTION = "attention"
    GRAPH = "CUDA graph"
    SAMPLE = "sample"
    READ = "read"
    COPY = "copy"
    KV_COPY = "KV copy"
    KV_LOG = "KV log"
    KV_WAIT = "wait for KV"
    SEND = "send"
    RECV = "recv"
    SCHEDULE = "schedule"
    IN_FLIGHT = "in flight"
    COMMIT = "commit"
    RECOVERY = "recovery"
    REPLACE = "replace a stage"


ON_HOST = frozenset(
    {
        Kind.PASS,
        Kind.READ,
        Kind.KV_LOG,
        Kind.KV_WAIT,
        Kind.SCHEDULE,
        Kind.IN_FLIGHT,
        Kind.COMMIT,
        Kind.RECOVERY,
        Kind.REPLACE,
    }
)
"""Timed by the host's clock on every device; the others happen on the stream that is current."""


class Span(NamedTuple):
    """Some time of one resource: nanoseconds since the epoch, by the node's wall clock.

    `thread` names the thread of a read. `name` and `number` (-1: none) say what was worked on: a file,
    an edge and its n-th message, a pass, a visit, a layer, a kind of moves and one's number.
    """

    kind: Kind
    start: int
    end: int
    thread: str
    name: str
    number: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What a tracer kept: the spans of the newest passes, and each kind's seconds in all of them.

    `complete` is False when a pass had more spans than are kept. To compare `node`'s clock with the
    driver's, subtract `ahead` nanoseconds, which are right to `uncertain` nanoseconds.
    """

    node: str
    spans: tuple[Span, ...]
    seconds: dict[Kind, float]
    complete: bool
    ahead: int = 0
    uncertain: int = 0


class Tracer(Protocol):
    """Notes what time was spent on. Any thread may open spans."""

    @property
    def on(self) -> bool:
        """Whether spans are kept: for work that is done only to be timed."""

    def span(
        self, kind: Kind, name: str = "", number: int = -1, nbytes: int = 0
    ) -> AbstractContextManager[None]:
        """The time spent within the block, or that the current stream spends on what it queues."""

    def one_pass(self, step: int) -> AbstractContextManager[None]:
        """A span around a pass. Its end finds the stream idle, and is when events are read."""

    def add_since(self, start: int, kind: Kind, number: int) -> None:
        """A span of the host's that began at `start` (time.time_ns) elsewhere, and ends now."""


NO_SPAN = nullcontext()


class NullTracer:
    """Keeps nothing and allocates nothing."""

    on = False

    def span(
        self, kind: Kind, name: str = "", number: int = -1, nbytes: int = 0
    ) -> AbstractContextManager[None]:
        return NO_SPAN

    def one_pass(self, step: int) -> AbstractContextManager[None]:
        return NO_SPAN

    def add_since(self, start: int, kind: Kind, number: int) -> None:
        pass


NULL_TRACER = NullTracer()


class SwitchTracer:
    """What a ring's parts are given when they are made: spans go to a recorder while there is one.

    Without one a span costs some 40 ns more than one of NULL_TRACER: a pass has hundreds of them.
    """

    def __init__(self) -> None:
        self._to: Tracer = NULL_TRACER

    def turn(self, to: Tracer) -> None:
        """Spans that are opened from now on are this tracer's."""
        self._to = to

    @property
    def on(self) -> bool:
        return self._to.on

    def span(
        self, kind: Kind, name: str = "", number: int = -1, nbytes: int = 0
    ) -> AbstractContextManager[None]:
        return self._to.span(kind, name, number, nbytes)

    def one_pass(self, step: int) -> AbstractContextManager[None]:
        return self._to.one_pass(step)

    def add_since(self, start: int, kind: Kind, number: int) -> None:
        self._to.add_since(start, kind, number)
