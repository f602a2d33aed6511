"""From the bytes of a request to what the engine generates. Slow for long prompts: not for the event
loop."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from uuid import uuid4

from pydantic import BaseModel

from headrace.cluster.encoding.encoder import Encoder
from headrace.cluster.rows import (
    Kind,
    chat_tokens,
    check_tokens,
    load_object,
    prompt_tokens,
    sampling_params,
    template_options,
)
from headrace.cluster.seeds import derive_seed
from headrace.cluster.serving.bodies import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    StreamOptions,
    TokenizeRequest,
)
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.generation import Order
from headrace.cluster.serving.served_engine import ServedEngine
from headrace.cluster.serving.terms import Terms
from headrace.cluster.tools.models import MAX_TOOLS
from headrace.cluster.tools.use import ToolUse, chat_template_with, for_template, tool_use
from headrace.scheduler.errors import RequestError
from headrace.scheduler.request import MAX_BIASES, SamplingParams

MAX_STOPS = 16
MAX_STOP = 256
_MAX_NAMES = 64
_FREE = frozenset({"chat_template_kwargs", "logit_bias", "schema", "json", "parameters"})

B = TypeVar("B", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Model:
    """What is served: its name for clients, tokenizer, digest, and the longest sequence in tokens."""

    name: str
    tokenizer: Any
    digest: str
    max_context: int


@dataclass(frozen=True, slots=True)
class Work:
    """A request that is ready to run: `n` sequences for each of its prompts, one after the other.

    `name` is the request's own, in the answer's id. The answers may have calls of `tools` in them. All run with the `adapter` of that name.
    """

    kind: Kind
    name: str
    orders: list[Order]
    n: int
    streams: bool
    include_usage: bool
    terms: Terms
    tools: ToolUse | None = None
    adapter: str | None = None


class Reader:
    """Checks requests and turns them into tokens. Any thread may call it.

    Raises ApiError, RequestError and pydantic's ValidationError for what clients do wrong. What they
    send is bounded before work is done for it: `max_sequences` are the most that a request may ask for.
    """

    def __init__(self, model: Model, engine: ServedEngine, max_sequences: int) -> None:
        self._model, self._engine, self._max_sequences = model, engine, max_sequences
        self._reserved = _reserved(model.tokenizer)
        self._encoder = Encoder(model.tokenizer)

    def completion(self, raw: bytes, tenant: str) -> Work:
        return self.completion_of(_object(raw), tenant)

    def completion_of(self, given: dict[str, Any], tenant: str) -> Work:
        body = self._parse(CompletionRequest, given)
        self._check_count(len(body.prompts) * (body.n or 1))
        context = self._model.max_context
        prompts = [
            prompt_tokens(self._encoder, each, context=context, tenant=tenant)
            if isinstance(each, str)
            else each
            for each in body.prompts
        ]
        params = sampling_params(body, SamplingParams())
        return self._work(Kind.COMPLETION, prompts, params, body, tenant)

    def chat(self, raw: bytes, tenant: str) -> Work:
        return self.chat_of(_object(raw), tenant)

    def chat_of(self, given: dict[str, Any], tenant: str) -> Work:
        """Without a limit of its own, an answer may fill the context."""
        body = self._parse(ChatRequest, given)
        self._check_count(body.n or 1)
        tools = tool_use(body, self._model.tokenizer)
        told = None if tools is None else tools.told
        context = self._model.max_context
        options = template_options(body, self._model.tokenizer)
        prompt = self._conversation(body, options, told, tenant, context)
        room = max(1, context - len(prompt))
        params = sampling_params(body, SamplingParams(max_tokens=room))
        if tools is None:
            return self._work(Kind.CHAT, [prompt], params, body, tenant)
        work = self._work(Kind.CHAT, [prompt], tools.sampling(params), body, tenant)
        return replace(work, tools=tools.after(prompt, self._model.tokenizer))

    def tokenize(self, raw: bytes, tenant: str) -> dict[str, Any]:
        body = self._parse(TokenizeRequest, _object(raw))
        if body.messages is not None:
            told = for_template(body.tools or ())
            if told:
                chat_template_with(self._model.tokenizer, told)
            tokens = self._conversation(body, body.chat_template_kwargs, told, tenant)
        else:
            assert body.prompt is not None
            tokens = prompt_tokens(self._encoder, body.prompt, tenant=tenant)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self._model.max_context}

    def detokenize(self, raw: bytes) -> dict[str, Any]:
        tokens = self._parse(DetokenizeRequest, _object(raw)).tokens
        vocabulary = len(self._model.tokenizer)
        if max(tokens, default=0) >= vocabulary:
            raise RequestError(
                f"token {max(tokens)} is outside the vocabulary of {vocabulary} tokens", "tokens"
            )
        return {"prompt": self._model.tokenizer.decode(tokens)}

    @property
    def names(self) -> list[str]:
        """What a request may call the model: with an adapter, that has its name."""
        return [self._model.name, *self._engine.adapters]

    @property
    def adapters(self) -> dict[str, str]:
        """Digests by name of those that a request may name."""
        return self._engine.adapters.digests()

    def _parse(self, shape: type[B], given: dict[str, Any]) -> B:
        name = given.get("model")
        if name is not None and name not in self.names:
            there = ", ".join(map(repr, self.names[:20]))
            told = f"there is no model {str(name)[:80]!r} here; this server has {there}"
            raise ApiError(404, told, param="model", code="model_not_found")
        # Null means not given, also for what is not known here.
        present = {key: value for key, value in given.items() if value is not None}
        _check_names(present)
        return shape.model_validate(present)

    def _check_count(self, count: int) -> None:
        if count > self._max_sequences:
            raise RequestError(
                f"the request asks for {count} sequences (prompts times n), and no more than"
                f" {self._max_sequences} may wait at once: send several requests",
                "n",
            )

    def _conversation(
        self,
        body: ChatRequest | TokenizeRequest,
        options: dict[str, Any] | None,
        tools: Sequence[dict[str, Any]] | None,
        tenant: str,
        context: int | None = None,
    ) -> list[int]:
        if taken := sorted(self._reserved & (options or {}).keys()):
            raise RequestError(
                f"chat_template_kwargs may not set {', '.join(taken)}: it is for variables of the"
                " model's own template",
                "chat_template_kwargs",
            )
        told = [message.for_template() for message in body.messages or ()]
        return chat_tokens(self._encoder, told, options, tools, context=context, tenant=tenant)

    def _work(
        self,
        kind: Kind,
        prompts: list[list[int]],
        params: SamplingParams,
        body: CompletionRequest | ChatRequest,
        tenant: str,
    ) -> Work:
        field = "messages" if kind is Kind.CHAT else "prompt"
        one, name = replace(params, n=1), uuid4().hex
        adapter = self._engine.adapters.chosen(body.adapter, body.model)
        if len(params.stop) > MAX_STOPS or any(len(stop) > MAX_STOP for stop in params.stop):
            # Each token of the answer is compared with all of them.
            raise RequestError(
                f"stop may have {MAX_STOPS} strings of {MAX_STOP} characters at most", "stop"
            )
        try:
            for prompt in prompts:
                check_tokens(prompt, self._model.tokenizer, self._model.max_context)
                self._engine.check(prompt, one)
        except RequestError as error:
            error.param = error.param or field
            raise
        keep = bool(body.keep_context)
        orders = [
            Order(prompt, one, self._seed(params, name, i, index), tenant, keep, adapter)
            for i, prompt in enumerate(prompts)
            for index in range(params.n)
        ]
        options = _stream_options(body.stream, body.stream_options)
        streams, usage = bool(body.stream), bool(options.include_usage)
        terms = body.terms
        return Work(kind, name, orders, params.n, streams, usage, terms, adapter=adapter)

    def _seed(self, params: SamplingParams, name: str, prompt: int, index: int) -> int:
        """With a seed of the request's own, a prompt's samples are those of a batch row."""
        own = f"{name} {prompt}" if params.seed is None else params.seed
        return derive_seed(self._model.digest, own, index)


def _object(raw: bytes) -> dict[str, Any]:
    return load_object(raw, "the body")


def _check_names(given: dict[str, Any]) -> None:
    """An error is made of each name that is unknown, so there must not be millions."""
    biases = given.get("logit_bias")
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise RequestError(f"logit_bias may have {MAX_BIASES} tokens at most", "logit_bias")
    if any(len(each) > _MAX_NAMES for each in _options(given, depth=4)):
        raise RequestError(f"an object in the body has more than {_MAX_NAMES} names")


def _options(given: dict[str, Any], depth: int) -> Iterator[dict[str, Any]]:
    """The objects whose names are ours to know; those of `_FREE` are the client's own."""
    yield given
    for name, value in given.items():
        inner = value[: MAX_TOOLS + 1] if name == "tools" and isinstance(value, list) else [value]
        for each in inner:
            if depth and isinstance(each, dict) and name not in _FREE:
                yield from _options(each, depth - 1)


def _stream_options(stream: bool | None, options: StreamOptions | None) -> StreamOptions:
    if options is not None and not stream:
        raise RequestError('stream_options needs "stream": true', "stream_options")
    return options or StreamOptions()


def _reserved(tokenizer: Any) -> frozenset[str]:
    """Names that would not reach the template, but change how it is used, or be another one.

    A template is a program, and a client's would run here.
    """
    return frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)
