"""What bounds a pass and the requests in it."""

from dataclasses import dataclass, fields

from headrace.scheduler.errors import HeadraceError


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits that the scheduler keeps, taken from the plan.

    `num_pages` KV pages; `max_context` tokens a request, prompt and output together; at most
    `token_budget` tokens and `max_sequences` slices a pass, in at most `micro_batches`
    micro-batches of at most `micro_batch_tokens` tokens each. The engine keeps up to
    `passes_in_flight` passes under way, over which requests are spread evenly, and `ahead` (0 or 1)
    more, made before the tokens that they continue are known. No more than `num_tails` requests run
    at once; 0 bounds them by their pages alone.

    Raises HeadraceError for a limit that no request could meet.
    """

    num_pages: int
    max_context: int
    token_budget: int
    max_sequences: int
    micro_batches: int
    micro_batch_tokens: int
    passes_in_flight: int = 1
    ahead: int = 0
    num_tails: int = 0

    def __post_init__(self) -> None:
        assert self.ahead <= 1, "a pass follows the one before, whose tokens a stage remembers"
        for limit in fields(self):
            # The shortest request is one token of prompt and one of output.
            least = {"max_context": 2, "ahead": 0, "num_tails": 0}.get(limit.name, 1)
            value = getattr(self, limit.name)
            if value < least:
                raise HeadraceError(
                    f"scheduler: {limit.name} must be at least {least}, not {value}"
                )
