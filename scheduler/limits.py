"""How long a request may become, and which ones can never run."""

from headrace.scheduler.config import SchedulerConfig
from headrace.scheduler.errors import ContextLengthError, RequestError
from headrace.scheduler.pages import pages_for
from headrace.scheduler.plan import PAGE_TOKENS
from headrace.scheduler.request import Request


def token_limit(request: Request, config: SchedulerConfig) -> int:
    """Tokens at which the request ends. The last one is never computed and needs no page."""
    return min(request.num_prompt + request.params.max_tokens, config.max_context)


def check_request(request: Request, config: SchedulerConfig) -> None:
    """Raise RequestError for a request that could not even run alone."""
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
