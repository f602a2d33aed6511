"""What the engine hands back when a request has ended."""

from dataclasses import dataclass

from headrace.scheduler.plan import Sample


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sequence.

    `token_ids` are the generated tokens without the prompt's `num_prompt` ones, of which `num_cached` were found in
    caches. `text` is their
    decoded form, cut at a stop string. `finish_reason` is "stop", "length" or "abort". `logprobs`
    has one Sample per generated token when the request asked for them and is None otherwise. `error` says
    why a request that was well-formed could not go on; its reason is "abort".
    """

    request_id: int
    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[Sample] | None
    num_prompt: int
    error: str | None = None
    num_cached: int = 0
