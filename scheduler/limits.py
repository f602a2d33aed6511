"""What a plan allows: how long a request may become, and which ones can never run."""

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.errors import ContextLengthError, RequestError
from headrace.scheduler.pages import pages_for
from headrace.scheduler.placement import Plan
from headrace.scheduler.plan import PAGE_TOKENS
from headrace.scheduler.request import Request


def token_limit(request: Request, config: SchedulerConfig) -> int:
    """Tokens at which the request ends. The last one is never computed and needs no page."""
    return min(request.num_prompt + request.params.max_tokens, config.max_context)


def check_request(request: Request, config: SchedulerConfig) -> None:
    """Raise RequestError for a request that could not even run alone."""
    if request.adapter is not None and not config.adapter_slots:
        raise RequestError(
            "the engine has no slots for adapters: name adapters when it starts (--adapter NAME=DIR), or give"
            " it --adapter-slots"
        )
    if not request.tokens:
        raise RequestError("the prompt is empty; give it at least one token")
    if request.num_prompt + 1 > config.max_context:
        raise ContextLengthError(
            f"the prompt has {request.num_prompt} tokens, but a context of "
            f"{config.max_context} tokens holds at most {config.max_context - 1} and "
            "one of output; shorten the prompt or raise --context"
        )
    limit = token_limit(request, config)
    need = pages_for(limit - 1)
    if need > config.num_pages:
        raise ContextLengthError(
            f"a prompt of {request.num_prompt} tokens and up to "
            f"{limit - request.num_prompt} of output need {need} KV pages of "
            f"{PAGE_TOKENS} tokens, but there are {config.num_pages}; shorten the prompt, "
            "lower max_tokens or raise --context"
        )


LEAST_PART = PAGE_TOKENS
"""Tokens of a prompt that are worth a place in another micro-batch."""


def limits_of(plan: Plan, identity: str = "", *, write_through: bool = False) -> SchedulerConfig:
    """What the scheduler is told of a plan; `identity` is of what its keys and values depend on.

    Prompts are cut where several stages have one pass under way: each waits for the micro-batch that takes longest. Not
    where experts are loaded as tokens reach them: each part would reach nearly all, once more.
    """
    is_convoy = plan.placement.num_stages > 1 and plan.passes_in_flight == 1
    return SchedulerConfig(
        num_pages=plan.num_pages,
        num_tails=plan.num_tails,
        max_context=plan.max_context,
        token_budget=plan.token_budget,
        max_sequences=plan.max_sequences,
        micro_batches=plan.micro_batches,
        micro_batch_tokens=plan.micro_batch_tokens,
        passes_in_flight=plan.passes_in_flight,
        ahead=plan.ahead,
        host_pages=plan.host_pages,
        nvme_pages=plan.nvme_pages,
        costs=plan.kv_costs,
        drafts=plan.drafts,
        kv_ring_pages=plan.kv_ring_pages,
        cold_micro_batches=plan.cold_micro_batches,
        window_pages=plan.window_pages,
        hot_window=plan.hot_window,
        write_through=write_through,
        adapter_slots=plan.adapter_slots,
        least_part=LEAST_PART if is_convoy and not any(plan.expert_slots) else 0,
        identity=identity,
    )
