"""What bounds a pass and the requests in it, and where their KV pages may lie."""

import math
from dataclasses import dataclass, field, fields

from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.plan import PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class KVCosts:
    """What a full page of a request costs, in seconds, beside the pass that computes anyway.

    `host_page` to load it from host RAM, `nvme_page` from NVMe (through host RAM), `token` to compute
    one of its tokens. Where all are 0, whatever is found is loaded. `decode` is what a decoded token is
    worth: a request whose pages lie in host RAM has them brought for each token, and goes on where that
    takes no longer.
    """

    host_page: float = 0.0
    nvme_page: float = 0.0
    token: float = 0.0
    decode: float = math.inf

    @property
    def computed_page(self) -> float:
        return PAGE_TOKENS * self.token


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """Up to `most` drafts a slice (0: there are none), as long as a pass has no more than `most_tokens`
    tokens with them, and where it has at least `least_tokens` without. Where passes are made ahead, one
    that drafts has to be worth `least_gain` tokens more for each sequence: a request cannot be drafted
    before its token is known, and the pass waits for it."""

    most: int = 0
    most_tokens: int = 0
    least_tokens: int = 0
    least_gain: float = 0.0


_OPTIONAL = (
    "ahead",
    "num_tails",
    "host_pages",
    "nvme_pages",
    "kv_ring_pages",
    "cold_micro_batches",
    "window_pages",
    "hot_window",
    "write_through",
    "adapter_slots",
    "least_part",
)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits that the scheduler keeps, taken from the plan.

    `num_pages` KV pages; `max_context` tokens a request, prompt and output together; at most
    `token_budget` tokens and `max_sequences` slices a pass, in at most `micro_batches`
    micro-batches of at most `micro_batch_tokens` tokens each. Prompts with more than their share of the pass's tokens are
    cut in parts of at least `least_part` tokens for several of these; with 0 they are not. The engine keeps up to
    `passes_in_flight` passes under way, over which requests are spread evenly, and `ahead` (0 or 1)
    more, made before the tokens that they continue are known. No more than `num_tails` requests run
    at once; 0 bounds them by their pages alone.

    Requests may go on decoding while their full pages lie in host RAM, in up to `cold_micro_batches` more
    micro-batches of at most `kv_ring_pages` pages; none does where these are 0. Those of their pages
    that are older than `hot_window` tokens may lie in `window_pages` slots on NVMe.

    Full pages go to `host_pages` slots in host RAM and from there to NVMe, which has room for
    `nvme_pages`; at most `write_backs` a pass to each while there is time, and as `costs` say. With
    `write_through` all of them do, soon after they were computed: for stages that die.
    Requests with adapters run while these are in `adapter_slots`.
    Decodes carry `drafts`. `identity` names all that keys and values depend on besides tokens (model, formats), for an adapter is each request's own:
    what a run finds on NVMe of an earlier one is of the same identity or not found.

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
    host_pages: int = 0
    nvme_pages: int = 0
    kv_ring_pages: int = 0
    cold_micro_batches: int = 0
    window_pages: int = 0
    hot_window: int = 0
    write_backs: int = 16
    write_through: bool = False
    costs: KVCosts = field(default_factory=KVCosts)
    drafts: DraftLimits = field(default_factory=DraftLimits)
    adapter_slots: int = 0
    least_part: int = 0
    identity: str = ""

    def __post_init__(self) -> None:
        assert self.ahead <= 1, "a pass follows the one before, whose tokens a stage remembers"
        # The shortest request is one token of prompt and one of output.
        least = {"max_context": 2} | dict.fromkeys(_OPTIONAL, 0)
        for limit in fields(self):
            value = getattr(self, limit.name)
            if isinstance(value, int) and value < least.get(limit.name, 1):
                raise HeadraceError(
                    f"scheduler: {limit.name} must be at least {least.get(limit.name, 1)}, not {value}"
                )
        if bool(self.kv_ring_pages) != bool(self.cold_micro_batches):
            raise HeadraceError(
                f"scheduler: {self.cold_micro_batches} micro-batches over pages in host RAM have room for"
                f" {self.kv_ring_pages} pages: give both or neither"
            )
        if self.window_pages and not self.kv_ring_pages:
            raise HeadraceError(
                f"scheduler: {self.window_pages} slots on NVMe are for requests that decode over pages"
                " that are not on the device, of which there are none: kv_ring_pages must be at least 1"
            )
        if self.nvme_pages and not self.host_pages:
            raise HeadraceError(
                f"scheduler: {self.nvme_pages} KV pages on NVMe are reached through host RAM, which "
                "has none: host_pages must be at least 1"
            )
