"""Drafts: guessed tokens that ride a pass, which says of each whether it is the one that would be drawn.

While weights stream, rows beyond the decodes cost nothing. So a decode may carry guesses of the tokens
after it: the last stage draws a token after each of its rows, with the random numbers that are those
positions' own, and as long as a guess is what was drawn before it, the next one counts, too. No token differs from what would come
without; a guess that is wrong has cost a row. What such rows wrote to pages lies behind what the
request has computed, and is overwritten before anybody may see it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.drafter import Drafter, Guesses
from headrace.scheduler.holdings import Holdings
from headrace.scheduler.limits import token_limit
from headrace.scheduler.pages import pages_for
from headrace.scheduler.plan import PAGE_TOKENS, MicroBatch, Slice
from headrace.scheduler.request import Request

INDEXED_AT_ONCE = 1 << 15
"""Tokens of prompts that are taken in for a pass, which takes some 15 ms."""


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """`decodes` drew `tokens`; they carried `drafts`, of which `accepted` were right."""

    decodes: int = 0
    tokens: int = 0
    drafts: int = 0
    accepted: int = 0

    @property
    def tokens_a_pass(self) -> float:
        """Tokens that a sequence gets of a pass that draws any for it."""
        return self.tokens / self.decodes if self.decodes else 0.0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafts if self.drafts else 0.0

    def plus(self, other: "DraftCounts") -> "DraftCounts":
        return DraftCounts(
            self.decodes + other.decodes,
            self.tokens + other.tokens,
            self.drafts + other.drafts,
            self.accepted + other.accepted,
        )

    def since(self, start: "DraftCounts") -> "DraftCounts":
        """What was added to `start`, earlier counts of the same engine."""
        return DraftCounts(
            self.decodes - start.decodes,
            self.tokens - start.tokens,
            self.drafts - start.drafts,
            self.accepted - start.accepted,
        )


def num_accepted(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """How many of the first `drafts` are what was drawn: drawn[i] after all before drafts[i]."""
    for i, (draft, token) in enumerate(zip(drafts, drawn, strict=False)):
        if draft != token:
            return i
    return min(len(drafts), len(drawn))


class Speculation:
    """Gives decodes of a pass drafts, where the plan says that these ride free.

    Where passes are made ahead, requests first show that their drafts would be worth waiting for the
    tokens before them: guesses are compared with what is drawn, whether they ride or not.
    """

    def __init__(self, config: SchedulerConfig, holdings: Holdings) -> None:
        self._config, self._limits, self._holdings = config, config.drafts, holdings
        self._is_quantized = config.num_tails > 0
        self._drafters: dict[int, Guesses] = {}
        self.make_drafter: Callable[[int], Guesses] = Drafter
        self.counts = DraftCounts()

    def waits(self, running: Iterable[Request]) -> bool:
        """Whether the next pass had better be made when the tokens before it are known."""
        if not self._limits.most:
            return False
        requests = list(running)
        return any(request.num_drafts for request in requests) or self._pays(requests)

    def _pays(self, requests: Sequence[Request]) -> bool:
        found = (self._drafters.get(request.request_id) for request in requests)
        gain = sum(drafter.gain for drafter in found if drafter is not None)
        return gain > 0 and gain >= self._limits.least_gain * len(requests)

    def extend(
        self, batches: tuple[MicroBatch, ...], requests: Mapping[int, Request], *, ahead: bool
    ) -> tuple[MicroBatch, ...]:
        """The micro-batches with drafts behind slices that draw; none where the pass is made `ahead`."""
        num_tokens = sum(batch.num_tokens for batch in batches)
        left = min(self._limits.most_tokens, self._config.token_budget) - num_tokens
        if left <= 0 or num_tokens < self._limits.least_tokens:
            return batches
        drawing = [
            requests[piece.request]
            for batch in batches
            for piece in batch.slices
            if piece.sampling is not None
        ]
        self._learn(drawing)
        if ahead or (self._config.ahead and not self._pays(drawing)):
            return batches
        longer = []
        for batch in batches:
            longer.append(self._longer(batch, requests, left))
            left -= longer[-1].num_tokens - batch.num_tokens
        return tuple(longer)

    def count(self, piece: Slice, tokens: int) -> None:
        """Take note of how many tokens a slice brought."""
        self.counts = self.counts.plus(DraftCounts(1, tokens, piece.num_drafts, tokens - 1))

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._drafters.pop(request.request_id, None)

    def _learn(self, requests: Iterable[Request]) -> None:
        left = INDEXED_AT_ONCE
        for request in requests:
            drafter = self._drafters.get(request.request_id)
            if drafter is None:
                drafter = self._drafters[request.request_id] = self.make_drafter(self._limits.most)
            left -= drafter.learn(request.tokens, left)

    def _longer(self, batch: MicroBatch, requests: Mapping[int, Request], left: int) -> MicroBatch:
        """The micro-batch with up to `left` tokens more."""
        left = min(left, self._config.micro_batch_tokens - batch.num_tokens)
        slices = []
        for piece in batch.slices:
            if left > 0 and piece.sampling is not None and not piece.follows:
                piece = self._with_drafts(piece, requests[piece.request], left)
                left -= piece.num_drafts
            slices.append(piece)
        return MicroBatch(tuple(slices))

    def _with_drafts(self, piece: Slice, request: Request, most: int) -> Slice:
        if request.mask:
            return piece  # what may follow a draft is known when that is committed
        drafter = self._drafters[request.request_id]
        left = token_limit(request, self._config) - 1 - piece.end
        wanted = min(most, left, drafter.num_wanted)
        drafts = drafter.drafts(min(wanted, self._room(piece, request))) if wanted > 0 else []
        if not drafts:
            return piece
        request.num_drafts = len(drafts)
        end = piece.end + len(drafts)
        return piece._replace(
            tokens=(*piece.tokens, *drafts),
            pages=tuple(request.pages[: pages_for(end) - request.num_cold]),
            num_drafts=len(drafts),
        )

    def _room(self, piece: Slice, request: Request) -> int:
        """Drafts that have a place in the request's pages, one more of which it is given only where that is
        free and it begins with the next token.

        No draft fills a page that is to be quantized then: what is in the tail would be gone. A slice
        over pages in host RAM has as many pages as its micro-batch has room for.
        """
        end = piece.end
        if piece.cold or request.is_hosted:
            room = -end % PAGE_TOKENS
        else:
            if end == request.num_pages * PAGE_TOKENS and self._holdings.can_grow(1):
                self._holdings.grow(request, 1)
            room = request.num_pages * PAGE_TOKENS - end
        return min(room, PAGE_TOKENS - 1 - end % PAGE_TOKENS) if self._is_quantized else room
