"""A request, its sampling parameters and why it ended."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from headrace.scheduler.errors import RequestError
from headrace.scheduler.pages import pages_for
from headrace.scheduler.plan import FOLLOWS, Adapter, Sampling, Slice
from headrace.scheduler.structured import StructuredOutputsParams

MAX_BIASES = 1024
"""Tokens with a bias of their own: they travel with every pass."""


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Priority(str, Enum):
    """Somebody waits for the tokens of an interactive request, and goes before batch ones."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to continue a prompt. Names and defaults are those that vLLM's users know.

    `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 are off. `repetition_penalty`
    divides (multiplies, when negative) the logits of every token seen in prompt or output;
    `presence_penalty` and `frequency_penalty` look at the output only, as OpenAI defines them.
    `seed` None draws from a seed derived from the request's identity, so that jobs can be resumed.
    `logprobs` k returns the chosen token's logprob and those of the k most likely. `logit_bias` adds to
    the logits of tokens (a mapping, kept as pairs): -100 forbids one, 100 leaves no other.
    `structured_outputs` ends an answer when it is complete.
    """

    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        # Lists from JSON and from vLLM habits become tuples; a single stop string is one of many.
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        for name, good, rule in (
            ("n", self.n >= 1, "at least 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0.0, "above 0"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
            ("stop", all(self.stop), "made of non-empty strings"),
        ):
            if not good:
                raise RequestError(f"{name} must be {rule}, not {getattr(self, name)!r}", name)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        return tuple(self.logit_bias)  # type: ignore[arg-type]

    @property
    def needs_history(self) -> bool:
        return bool(
            self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        )


def _pairs(
    biases: Mapping[int, float] | Iterable[tuple[int, float]] | None,
) -> tuple[tuple[int, float], ...]:
    """By token; RequestError for what is no bias."""
    given = biases.items() if isinstance(biases, Mapping) else biases or ()
    try:
        pairs = sorted((int(token), float(bias)) for token, bias in given)
    except (TypeError, ValueError) as error:
        told = f"logit_bias must map token ids to numbers: {error}"
        raise RequestError(told, "logit_bias") from error
    if len(pairs) > MAX_BIASES:
        told = f"logit_bias may have {MAX_BIASES} tokens at most, not {len(pairs)}"
        raise RequestError(told, "logit_bias")
    for token, bias in pairs:
        if token < 0 or not -100.0 <= bias <= 100.0:
            told = f"logit_bias must be between -100 and 100 and of a token, not {bias} of {token}"
            raise RequestError(told, "logit_bias")
    return tuple(pairs)


@dataclass(slots=True, eq=False)
class Request:
    """A sequence being continued. The scheduler owns it; `tokens` grows by what it commits.

    The pages hold the keys and values of the first `num_scheduled` tokens, once `passes` have run:
    the steps of those in flight that compute some of them. They draw `num_drawing` more tokens.
    Of its prompt `num_cached` tokens were found when it began for the first time; None: it has not.
    `tail` is the slot of the newest page while the request runs. Behind `num_scheduled` the pass in flight
    computes `num_drafts` guesses: those that prove right are scheduled by then.
    Whatever lies beyond `num_scheduled` is pending, so prefill, decode, a decode whose token is still
    being drawn and recompute after a preemption are the same subtraction.
    The first `num_named` pages are full, computed and found by others under `keys`; those that are
    `coming` are being loaded, and until they have come the request is in no pass.

    A request that `is_hosted` decodes over pages in host RAM. It holds `slots` for its first pages; `pages`
    begin behind the `num_cold` of these that it has on the device no more. To have all of them there
    again it holds `returning` pages, to which they are loaded. One of which a move failed `stays` as it
    is, on the device or not. The first `num_sunk` of the slots are on NVMe, counted from the number of host
    slots on, and the next ones are `sinking` to slots there, counted from 0. Pages that are to be kept
    do not sink, nor those of a request that found one of them damaged: while passes with it are in flight
    it `is_spoiled`, and what they compute for it is ignored.

    `mask` says which tokens may come next, where not all may; whoever sets it does so with each token that is
    committed, so that until then no further one can be drawn.

    No page of a `tenant` is found by another one, and a tenant's share of passes and pages goes by its
    `weight`: `num_charged` tokens have been counted. `rank` is 0 of interactive requests, and of batch
    ones that have been promoted; lower ranks go first, and in a rank whoever came first. `keep` brings the full pages to host RAM and NVMe
    once the request has stopped or reached its length, for a request that continues it. It runs with an
    `adapter`, in its `adapter_slot` while it runs; what was computed with another, or none, is not found by it.
    """

    request_id: int
    tokens: list[int]
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int] = frozenset()
    tenant: str = ""
    keep: bool = False
    mask: bytes = b""
    priority: Priority = Priority.INTERACTIVE
    weight: int = 1
    adapter: Adapter | None = None
    adapter_slot: int | None = field(init=False, default=None)
    rank: int = field(init=False)
    num_charged: int = field(init=False, default=0)
    num_prompt: int = field(init=False)
    num_cached: int | None = field(init=False, default=None)
    num_scheduled: int = field(init=False, default=0)
    num_drawing: int = field(init=False, default=0)
    num_drafts: int = field(init=False, default=0)
    passes: list[int] = field(init=False, default_factory=list)
    pages: list[int] = field(init=False, default_factory=list)
    tail: int | None = field(init=False, default=None)
    keys: list[bytes] = field(init=False, default_factory=list)
    num_named: int = field(init=False, default=0)
    coming: set[int] = field(init=False, default_factory=set)
    slots: list[int] = field(init=False, default_factory=list)
    num_cold: int = field(init=False, default=0)
    returning: list[int] = field(init=False, default_factory=list)
    is_hosted: bool = field(init=False, default=False)
    stays: bool = field(init=False, default=False)
    num_sunk: int = field(init=False, default=0)
    sinking: list[int] = field(init=False, default_factory=list)
    may_sink: bool = field(init=False)
    is_spoiled: bool = field(init=False, default=False)
    finish_reason: FinishReason | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.may_sink = not self.keep
        self.rank = int(self.priority is Priority.BATCH)

    @property
    def precedence(self) -> tuple[int, int]:
        """Whoever has less is preempted later."""
        return self.rank, self.request_id

    @property
    def num_pending(self) -> int:
        return len(self.tokens) + self.num_drawing - self.num_scheduled

    @property
    def num_pages(self) -> int:
        """Pages from its first on that it has, cold ones and those on the device."""
        return self.num_cold + len(self.pages)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    def truncate(self, num_output: int) -> None:
        """Keep the first tokens of the output: it ends there."""
        assert 0 <= num_output <= self.num_output, (num_output, self.num_output)
        del self.tokens[self.num_prompt + num_output :]

    def rewind(self, start: int) -> None:
        """Go on from `start`, which passes in flight had computed more than: they will not return."""
        assert start <= self.num_scheduled
        self.num_scheduled = start
        self.num_drawing = self.num_drafts = 0
        self.passes.clear()

    def slice_of(self, count: int) -> Slice:
        """Its next `count` pending tokens, for a pass. It has pages for them and a tail."""
        assert self.tail is not None, self.request_id
        start, end = self.num_scheduled, self.num_scheduled + count
        return Slice(
            request=self.request_id,
            start=start,
            tokens=tuple(self.tokens[start:end]) or (FOLLOWS,),
            pages=tuple(self.pages[: pages_for(end) - self.num_cold]),
            sampling=self.sampling() if count == self.num_pending else None,
            tail=self.tail,
            cold=tuple(self.slots[: self.num_cold]),
            adapter=self.adapter_slot,
        )

    def sampling(self) -> Sampling:
        """What the last stage needs to draw this request's next token."""
        params = self.params
        return Sampling(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=self.seed,
            logprobs=params.logprobs,
            num_prompt=self.num_prompt,
            history=tuple(self.tokens) if params.needs_history else (),
            logit_bias=params.biases,
            mask=self.mask,
        )
