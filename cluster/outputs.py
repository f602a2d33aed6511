"""What requests say, as their tokens are committed."""

from collections.abc import Callable, Sequence
from typing import Any

from headrace.cluster.completion import Completion
from headrace.cluster.detokenize import StopStrings, decode
from headrace.cluster.grammars import Followed, Grammars
from headrace.scheduler.errors import RequestError
from headrace.scheduler.plan import Sample
from headrace.scheduler.request import FinishReason, Request, SamplingParams


class Outputs:
    """Hands tokens on, keeps log-probabilities, looks for stop strings, follows grammars, and makes text of
    what has ended. One thread calls it, but for `check`, which any may call."""

    def __init__(self, tokenizer: Any, stop_ids: frozenset[int], vocabulary: int | None) -> None:
        """`stop_ids` end a text; the model has logits of `vocabulary` tokens, None: of the tokenizer's."""
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._grammars = Grammars(tokenizer, stop_ids, vocabulary)
        self._followed = Followed(self._grammars)
        self._watchers: dict[int, StopStrings] = {}
        self._logprobs: dict[int, list[Sample]] = {}
        self._listeners: dict[int, Callable[[Sample], None]] = {}

    def check(self, params: SamplingParams) -> None:
        """RequestError for what this model cannot have. Compiles the grammar, which may take a second."""
        if params.biases and params.biases[-1][0] >= len(self._tokenizer):
            token, count = params.biases[-1][0], len(self._tokenizer)
            told = f"token {token} is outside the vocabulary of {count} tokens"
            raise RequestError(f"logit_bias: {told}", "logit_bias")
        if params.structured_outputs is not None:
            self._grammars.compiled(params.structured_outputs)

    def start(
        self,
        request: Request,
        on_token: Callable[[Sample], None] | None,
        said: Sequence[Sample] = (),
    ) -> None:
        """Of a new request, whose params were checked, and which has `said` something that did not end it."""
        number, params = request.request_id, request.params
        if params.structured_outputs is not None:
            self._followed.start(request, params.structured_outputs)
        if params.stop:
            self._watchers[number] = StopStrings(self._tokenizer, params)
        if params.logprobs is not None:
            self._logprobs[number] = []
        for sample in said:
            self.push(number, sample)
        if on_token is not None:
            self._listeners[number] = on_token

    def push(self, request_id: int, sample: Sample) -> str | None:
        """Take in the next token; the request's final text if it completed a stop string."""
        if (listener := self._listeners.get(request_id)) is not None:
            listener(sample)
        if (noted := self._logprobs.get(request_id)) is not None:
            noted.append(sample)
        watcher = self._watchers.get(request_id)
        return watcher.push(sample.token) if watcher else None

    def follow(self, requests: Sequence[Request]) -> dict[Request, str | None]:
        """Followed.advance: of requests with a mask, each with a token more."""
        return self._followed.advance(requests)

    def complete(self, request: Request, text: str | None, error: str | None) -> Completion:
        """Of a request that has ended, with the final `text` if a stop string made it; and forget it."""
        tokens = request.output
        assert request.finish_reason is not None
        if text is None:
            # One that was given up may have no token.
            stopped = request.finish_reason is FinishReason.STOP
            by_id = stopped and tokens[-1] in request.stop_ids | self._stop_ids
            text = decode(self._tokenizer, tokens[:-1] if by_id else tokens, request.params)
        completion = Completion(
            request_id=request.request_id,
            token_ids=tokens,
            text=text,
            finish_reason=request.finish_reason.value,
            logprobs=self._logprobs.get(request.request_id),
            num_prompt=request.num_prompt,
            error=error,
            num_cached=request.num_cached or 0,
        )
        self.forget(request.request_id)
        return completion

    def forget(self, request_id: int) -> None:
        """Unknown ids are ignored."""
        self._watchers.pop(request_id, None)
        self._logprobs.pop(request_id, None)
        self._followed.drop(request_id)
        self._listeners.pop(request_id, None)
