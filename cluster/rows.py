"""Rows of a batch job's input: what a user may write, checked and turned into tokens.

Two shapes are understood, row by row:

    {"id"?, "prompt" | "messages", ...parameters}                          native
    {"custom_id", "method": "POST", "url": "/v1/...", "body": {...}}       OpenAI Batch

Parameters have OpenAI's names plus vLLM's extras; an unknown one is an error that names it.
Everything wrong with one row is a RequestError, so that the job can quarantine it and go on.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

from pydantic import ValidationError

from headrace.cluster.adapters import Adapters
from headrace.cluster.encoding.encoder import Encoder
from headrace.cluster.json_text import read_json
from headrace.cluster.row_models import (
    PARAMETERS,
    ChatBody,
    CompletionBody,
    Conversation,
    Envelope,
    NativeRow,
    Parameters,
    reasons,
)
from headrace.cluster.structured_models import wanted_form
from headrace.cluster.tools.use import ToolUse, tool_use
from headrace.scheduler.errors import ContextLengthError, RequestError
from headrace.scheduler.request import SamplingParams

_OF_TOKENS = frozenset(
    {"padding", "truncation", "max_length", "return_tensors", "return_assistant_tokens_mask"}
    | {"tokenizer_kwargs", "sanitize_control_tokens"}
)
"""What transformers takes beside a template's variables for the tokens of the text, which are ours."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that answers are made with."""

    @property
    def chat_template(self) -> Any: ...

    def __len__(self) -> int: ...

    @property
    def added_tokens_decoder(self) -> Any: ...

    def get_chat_template(self, chat_template: Any, tools: Any, /) -> Any: ...

    def apply_chat_template(self, conversation: Any, /, **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Any, /) -> Any: ...


class Kind(Enum):
    """The shape of a row, and so of its answer."""

    NATIVE = "native"
    COMPLETION = "/v1/completions"
    CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Draft:
    """A row that has an identity and has not been checked yet.

    `key` is a 64-bit hash of model, defaults, id and the row as it was written; never 0 or 1.
    """

    number: int
    id: str | int
    key: int
    batch: bool
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A row that is ready to run. `params.seed` is the row's own one, or None.

    `keep_context`: another row, of this job or of one to come, goes on from where this one ends. It runs with
    the `adapter` of that name.
    """

    number: int
    id: str | int
    key: int
    kind: Kind
    token_ids: list[int]
    params: SamplingParams
    keep_context: bool = False
    tools: ToolUse | None = None
    adapter: str | None = None

    @property
    def batch(self) -> bool:
        return self.kind is not Kind.NATIVE


def is_batch(raw: bytes | Mapping[str, Any]) -> bool:
    """Whether a row that may be unreadable was meant as an OpenAI Batch row."""
    return b'"custom_id"' in raw if isinstance(raw, bytes) else "custom_id" in raw


def decode(number: int, raw: bytes | Mapping[str, Any], salt: bytes) -> Draft:
    """Find out which row this is. Raises RequestError when it is no JSON object or has no valid id.

    `salt` stands for the model and the default parameters in the key.
    """
    data = load_object(raw) if isinstance(raw, bytes) else raw
    batch = "custom_id" in data or "body" in data
    row_id = data.get("custom_id" if batch else "id")
    if row_id is None and not batch:
        row_id = number
    if isinstance(row_id, bool) or not isinstance(row_id, str if batch else str | int):
        name, kinds = ("custom_id", "a string") if batch else ("id", "a string or an integer")
        raise RequestError(f"{name} must be {kinds}, not {str(row_id)[:80]}")
    written = raw if isinstance(raw, bytes) else json.dumps(raw, default=str).encode()
    key = digest64(salt, str(row_id).encode("utf-8", "surrogatepass"), written)
    return Draft(number, row_id, max(key, 2), batch, data)


def prepare(
    draft: Draft,
    encoder: Encoder,
    defaults: SamplingParams,
    max_context: int,
    adapters: Adapters | None = None,
) -> Row:
    """Check a row and tokenize it; it may name one of the `adapters`. Raises RequestError with a reason that the
    user can act upon."""
    kind, row = _validate(draft)
    model = None if isinstance(row, NativeRow) else row.model
    adapter = (adapters or Adapters()).chosen(row.adapter, model)
    params, tokenizer = sampling_params(row, defaults), encoder.tokenizer
    tools = None if isinstance(row, CompletionBody) else tool_use(row, tokenizer)
    token_ids = _token_ids(row, encoder, tools, max_context)
    check_tokens(token_ids, tokenizer, max_context)
    keep = bool(row.keep_context)
    if tools is not None:
        params, tools = tools.sampling(params), tools.after(token_ids, tokenizer)
    return Row(draft.number, draft.id, draft.key, kind, token_ids, params, keep, tools, adapter)


def check_tokens(token_ids: Sequence[int], tokenizer: Tokenizer, max_context: int) -> None:
    """Raise RequestError for a prompt that is empty, has unknown tokens or fills the context."""
    if not token_ids:
        raise RequestError("the prompt has no tokens")
    if max(token_ids) >= len(tokenizer):
        raise RequestError(
            f"token {max(token_ids)} is outside the vocabulary of {len(tokenizer)} tokens"
        )
    if len(token_ids) >= max_context:
        raise ContextLengthError(
            f"the prompt has {len(token_ids)} tokens and the context {max_context}, "
            "one of which must be left for the answer: shorten it or raise --context"
        )


def digest64(*parts: bytes) -> int:
    """A 64-bit hash of a sequence of byte strings, each taken with its length."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return int.from_bytes(state.digest(), "little")


def load_object(raw: bytes, what: str = "a row") -> dict[str, Any]:
    """A JSON object. RequestError when `raw` is none."""
    try:
        data = read_json(raw)
    except ValueError as error:
        raise RequestError(f"not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise RequestError(f"{what} must be a JSON object, not {type(data).__name__}")
    return data


def _validate(draft: Draft) -> tuple[Kind, NativeRow | CompletionBody | ChatBody]:
    try:
        if not draft.batch:
            return Kind.NATIVE, NativeRow.model_validate(draft.data)
        envelope = Envelope.model_validate(draft.data)
        if envelope.url == Kind.CHAT.value:
            return Kind.CHAT, ChatBody.model_validate(envelope.body)
        return Kind.COMPLETION, CompletionBody.model_validate(envelope.body)
    except ValidationError as error:
        raise RequestError(reasons(error)) from error


def _token_ids(
    row: NativeRow | CompletionBody | ChatBody,
    encoder: Encoder,
    tools: ToolUse | None,
    max_context: int,
) -> list[int]:
    if not isinstance(row, CompletionBody) and row.messages is not None:
        messages = [message.for_template() for message in row.messages]
        told = None if tools is None else tools.told
        options = row.chat_template_kwargs
        if isinstance(row, ChatBody):
            options = template_options(row, encoder.tokenizer)
        return chat_tokens(encoder, messages, options, told, context=max_context)
    assert not isinstance(row, ChatBody) and row.prompt is not None
    if not isinstance(row.prompt, str):
        return row.prompt
    return prompt_tokens(encoder, row.prompt, context=max_context)


def template_options(body: Conversation, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The variables of the model's template. RequestError for a `reasoning_effort` that it does not look at."""
    effort, options = body.reasoning_effort, body.chat_template_kwargs
    if effort is None:
        return options
    if "reasoning_effort" not in str(tokenizer.chat_template):
        told = "the model's chat template knows no reasoning_effort: leave it out"
        raise RequestError(told, "reasoning_effort")
    return {"reasoning_effort": effort, **(options or {})}


def sampling_params(row: Parameters, defaults: SamplingParams) -> SamplingParams:
    """A row's parameters over `defaults`, whose seed it never takes. RequestError for bad ones."""
    forms = {"response_format", "structured_outputs"}
    given = row.model_dump(include=set(PARAMETERS - forms), exclude_none=True)
    form = wanted_form(row.response_format, row.structured_outputs)
    if form is not None:
        given["structured_outputs"] = form
    limit = given.pop("max_completion_tokens", None)
    if limit is not None:
        given["max_tokens"] = limit
    top = given.pop("top_logprobs", None)
    wanted = given.get("logprobs")
    if isinstance(wanted, bool):  # OpenAI's chat API switches with one and counts with the other
        given["logprobs"] = (top or 0) if wanted else None
    if top is not None and not isinstance(wanted, bool):
        raise RequestError('top_logprobs needs "logprobs": true', "top_logprobs")
    return replace(defaults, **{"seed": None, **given})


def prompt_tokens(
    encoder: Encoder, text: str, *, context: int | None = None, tenant: str = ""
) -> list[int]:
    """Token ids of a text, with one BOS where the tokenizer adds one, even if the text has it.

    ContextLengthError, before the end is tokenized, for a long text that has more than `context`.
    RequestError when the tokenizer refuses it.
    """
    token_ids = _encoded(encoder, text, "prompt", special=True, context=context, tenant=tenant)
    bos = encoder.tokenizer.bos_token_id
    if bos is not None and token_ids[:2] == [bos, bos]:
        return token_ids[1:]
    return token_ids


def chat_tokens(
    encoder: Encoder,
    messages: list[dict[str, Any]],
    options: Mapping[str, Any] | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
    *,
    context: int | None = None,
    tenant: str = "",
) -> list[int]:
    """Token ids of a conversation up to where the assistant speaks, by the model's chat template.

    `options` are further variables of the template. Raises RequestError when there is no template
    and when it refuses the messages; else as `prompt_tokens`.
    """
    tokenizer = encoder.tokenizer
    if tokenizer.chat_template is None:
        raise RequestError('the model has no chat template: give "prompt" instead of "messages"')
    if taken := sorted(_OF_TOKENS & (options or {}).keys()):
        raise RequestError(
            f"chat_template_kwargs may not set {', '.join(taken)}", "chat_template_kwargs"
        )
    fixed: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
    if tools:
        fixed["tools"] = list(tools)
    try:
        # A template is a program that came with the model: whatever it raises concerns this row.
        text = tokenizer.apply_chat_template(messages, **{**(options or {}), **fixed})
    except Exception as error:
        raise RequestError(f"the chat template refused the messages: {error}") from error
    return _encoded(encoder, text, "messages", special=False, context=context, tenant=tenant)


def _encoded(encoder: Encoder, text: str, field: str, **how: Any) -> list[int]:
    try:
        return encoder.encode(text, **how).tolist()
    except ContextLengthError as error:
        error.param = field
        raise
    except Exception as error:
        raise RequestError(f"the tokenizer refused the prompt: {error}") from error
