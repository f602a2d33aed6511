"""What crosses to a stage: a Pass goes out, a PassResult comes back. Nothing else does.

Participation in every transfer and every sampled row is decided here, by the scheduler, never by a
stage: each stage derives what it receives, computes and sends from the same Pass and the same
placement.

What there is many of in a pass is a named tuple, which crosses as an array: without the names of its fields, and
made and read in less time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

PAGE_TOKENS = 64
"""Tokens in one KV page, on every stage and layer."""

FOLLOWS = -1
"""In place of a token that is not known yet: the one that the request's slice before draws."""


class Sampling(NamedTuple):
    """How the token after a slice is drawn.

    `history` carries the request's tokens so far (prompt and output) when a penalty needs them and
    is empty otherwise; `num_prompt` says how many of them are prompt. Where the slice's token
    FOLLOWS, it is missing at the end of `history`, too, as drafts are. The random number is a function of (seed,
    position) alone, so that running a pass again draws the same token. `logit_bias` holds (token, what
    is added to its logit). A token may be drawn where its bit in `mask` is set, counted from the lowest
    bit of the first byte; those behind its end may not. Empty where all may.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logprobs: int | None
    num_prompt: int
    history: tuple[int, ...]
    logit_bias: tuple[tuple[int, float], ...] = ()
    mask: bytes = b""


class Slice(NamedTuple):
    """Consecutive tokens of one request: positions [start, start + len(tokens)). In a pass a request has one, or parts of
    one that follow each other, in micro-batches that do.

    Page i holds positions [64 i, 64 i + 64). The first len(cold) pages, which are full, lie in the
    slots `cold`, the others in the device pages `pages`; together they cover at least the slice's end,
    and what the slice writes is in the latter. Slots below the plan's `host_pages` are in host RAM,
    those from there on on NVMe.
    `sampling` is None while the slice does not reach the end of the request's tokens. A decode's
    token may be FOLLOWS. The last `num_drafts` tokens are guesses; one is drawn after each of them, and
    after the last token that is known. `tail` is the request's own slot for its newest page, where full pages are
    quantized. `adapter` is the slot of the adapter that it runs with, None without.
    """

    request: int
    start: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    sampling: Sampling | None
    tail: int = 0
    cold: tuple[int, ...] = ()
    num_drafts: int = 0
    adapter: int | None = None

    def part(self, begin: int, end: int) -> "Slice":
        """Its tokens [begin, end). It has no cold pages and no drafts; what is drawn is drawn behind its last token."""
        assert not self.cold and not self.num_drafts
        pages = -(-(self.start + end) // PAGE_TOKENS)
        return self._replace(
            start=self.start + begin,
            tokens=self.tokens[begin:end],
            pages=self.pages[:pages],
            sampling=self.sampling if end == len(self.tokens) else None,
        )

    @property
    def num_pages(self) -> int:
        return len(self.cold) + len(self.pages)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def known_end(self) -> int:
        """Where its drafts begin."""
        return self.end - self.num_drafts

    @property
    def drafts(self) -> tuple[int, ...]:
        return self.tokens[len(self.tokens) - self.num_drafts :]

    @property
    def num_drawn(self) -> int:
        """Rows that a token is drawn after: its last ones."""
        return 0 if self.sampling is None else 1 + self.num_drafts

    @property
    def follows(self) -> bool:
        """Whether its token is not known yet."""
        return self.tokens[-1] == FOLLOWS


def joined(parts: Sequence[Slice]) -> Slice:
    """Consecutive parts of one slice as one."""
    first, last = parts[0], parts[-1]
    return last._replace(start=first.start, tokens=tuple(t for part in parts for t in part.tokens))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Slices that travel together; hidden states are packed in this order.

    With a cold page among them, their pages together are no more than `Plan.kv_ring_pages`.
    """

    slices: tuple[Slice, ...]

    @property
    def num_cold(self) -> int:
        """Pages that are to be brought from host slots, or from slots on NVMe."""
        return sum(len(piece.cold) for piece in self.slices)

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.slices)


class MoveKind(str, Enum):
    """From where to where a full page is copied. What is on NVMe is reached through a host slot."""

    OUT = "out"  # device page -> host slot
    IN = "in"  # host slot -> device page
    SPILL = "spill"  # host slot -> NVMe
    FETCH = "fetch"  # NVMe -> host slot
    SINK = "sink"  # host slot -> slot on NVMe, from which it is brought to attention


NO_PAGE = -1


@dataclass(frozen=True, slots=True)
class PageMove:
    """A copy of one full page on every stage, beside the pass that brings it and maybe later ones.

    It sees what passes before that one wrote. Until every stage has reported its `number`, nothing else
    writes what it reads, or touches what it writes. `page` is the device page of OUT and IN (NO_PAGE
    for the others), `slot` a host slot, `nvme_slot` the slot that a SINK writes, counted from 0. `key`
    names what the page holds, by which the log on NVMe keeps it; `cohort` are pages that will go
    together.
    """

    number: int
    kind: MoveKind
    slot: int
    page: int
    key: bytes
    cohort: int
    nvme_slot: int = NO_PAGE


@dataclass(frozen=True, slots=True)
class Adapter:
    """Low-rank changes of a model's matrices: files of a `digest`, in the directory `path` on each stage's
    node."""

    digest: str
    path: str


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """Each stage brings its layers' part of an adapter to a slot of its device, beside the pass that says so.

    No slice uses the slot until every stage has reported the `number`, as one of a move.
    """

    number: int
    slot: int
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class Pass:
    """One sweep through every layer. Stages execute passes in the order of `step`.

    Tokens that FOLLOW are drawn in the earlier pass whose step is `follows`; None when all are known.
    Without micro-batches it ends when all `moves` under way have, and all loads of `adapters`.
    """

    step: int
    micro_batches: tuple[MicroBatch, ...]
    follows: int | None = None
    moves: tuple[PageMove, ...] = ()
    adapters: tuple[AdapterLoad, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(batch.num_tokens for batch in self.micro_batches)

    @property
    def num_cold(self) -> int:
        """Pages that every stage brings for each of its layers."""
        return sum(batch.num_cold for batch in self.micro_batches)


class Sample(NamedTuple):
    """One drawn token. `top` holds (token, logprob) of the most likely ones, when asked for."""

    request: int
    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Where one stage's pass went, in seconds, and what it streamed, in bytes.

    `kv_wait` is how long it waited for KV pages, `kv_cold_bytes` what it brought of cold ones, `kv_sunk_bytes` what it read of NVMe for that, and `kv_out_bytes` and `kv_in_bytes` what
    those that have ended since the pass before took to host RAM and back to the device, as `adapter_bytes` are of
    loads of adapters. `experts_used` counts the experts that tokens reached, each once a layer and micro-batch,
    `experts_loaded` those of them that were not on the device. Their bytes are in the bytes.
    """

    stage: int
    total: float
    weights_wait: float
    link_wait: float
    nvme_bytes: int
    host_bytes: int
    experts_used: int = 0
    experts_loaded: int = 0
    kv_wait: float = 0.0
    kv_out_bytes: int = 0
    kv_in_bytes: int = 0
    kv_cold_bytes: int = 0
    kv_sunk_bytes: int = 0
    adapter_bytes: int = 0

    def plus(self, other: "StageTimes") -> "StageTimes":
        """The two times of one stage together."""
        return StageTimes(
            self.stage,
            self.total + other.total,
            self.weights_wait + other.weights_wait,
            self.link_wait + other.link_wait,
            self.nvme_bytes + other.nvme_bytes,
            self.host_bytes + other.host_bytes,
            self.experts_used + other.experts_used,
            self.experts_loaded + other.experts_loaded,
            self.kv_wait + other.kv_wait,
            self.kv_out_bytes + other.kv_out_bytes,
            self.kv_in_bytes + other.kv_in_bytes,
            self.kv_cold_bytes + other.kv_cold_bytes,
            self.kv_sunk_bytes + other.kv_sunk_bytes,
            self.adapter_bytes + other.adapter_bytes,
        )

    def since(self, start: "StageTimes") -> "StageTimes":
        """What was added to `start`, an earlier sum of the same stage."""
        return StageTimes(
            self.stage,
            self.total - start.total,
            self.weights_wait - start.weights_wait,
            self.link_wait - start.link_wait,
            self.nvme_bytes - start.nvme_bytes,
            self.host_bytes - start.host_bytes,
            self.experts_used - start.experts_used,
            self.experts_loaded - start.experts_loaded,
            self.kv_wait - start.kv_wait,
            self.kv_out_bytes - start.kv_out_bytes,
            self.kv_in_bytes - start.kv_in_bytes,
            self.kv_cold_bytes - start.kv_cold_bytes,
            self.kv_sunk_bytes - start.kv_sunk_bytes,
            self.adapter_bytes - start.adapter_bytes,
        )


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a stage returns: samples only from the stage of the last visit, times from every one.

    A slice that draws has one sample, and with drafts one more for each that was right, in order.

    `moved` and `lost` are the moves and loads of adapters of this and earlier passes that ended since the last result, with
    their page or without it. `spoiled` are requests of the pass of which a page on NVMe could not be
    had: what was computed for them is worth nothing. `failures` say of loads that are lost why.
    """

    step: int
    samples: tuple[Sample, ...]
    times: StageTimes
    moved: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    spoiled: tuple[int, ...] = ()
    failures: tuple[tuple[int, str], ...] = ()
