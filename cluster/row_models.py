"""What a row of a batch job may hold, and what is wrong with one that holds something else.

The names are OpenAI's, plus vLLM's extras and `keep_context`. An unknown name is an error, so that a misspelled
parameter is never silently ignored. Those of OpenAI's that would change nothing here are taken, with the values
that would not, since clients send them unasked.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from headrace.cluster.json_text import read_json
from headrace.cluster.structured_models import ResponseFormat, StructuredOutputs
from headrace.cluster.tools.models import ToolChoice, Tools
from headrace.scheduler.errors import RequestError

_Count = Annotated[int, Field(lt=2**31)]


class Parameters(BaseModel):
    """Null means not given, as in OpenAI's requests and in Parquet columns."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    temperature: float | None = None
    top_k: _Count | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    logit_bias: dict[Annotated[int, Field(ge=0)], float] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


PARAMETERS = frozenset(Parameters.model_fields)


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """Further keys (name, tool_calls, ...) go to the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None

    def for_template(self) -> dict[str, Any]:
        """RequestError for calls that are none."""
        message = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            message["content"] = "\n".join(part.text for part in self.content)
        if message.get("tool_calls"):
            message["tool_calls"] = [_readable(call) for call in message["tool_calls"]]
            message.setdefault("content", "")
        return message


def _readable(call: Any) -> Any:
    """A call with its arguments as templates read them: OpenAI's clients send them as text."""
    try:
        function = dict(call["function"])
        given = function.get("arguments")
        if isinstance(given, str):
            function["arguments"] = read_json(given or "{}")
        return {**call, "function": function}
    except (TypeError, KeyError, ValueError) as error:
        told = 'tool_calls must have a "function" with "arguments" that are JSON'
        raise RequestError(f"{told}: {error}", "messages") from error


TokenId = Annotated[int, Field(ge=0)]
Prompt = str | list[TokenId]


class OwnParameters(Parameters):
    """And ours, which is none of sampling."""

    keep_context: bool | None = None
    adapter: str | None = None


class WithTools(BaseModel):
    """Of conversations."""

    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class NativeRow(OwnParameters, WithTools):
    id: str | int | None = None
    prompt: Prompt | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def one_prompt(self) -> "NativeRow":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError('give either "prompt" or "messages"')
        if self.messages is None and (self.tools or self.tool_choice):
            raise ValueError('tools need "messages"')
        return self


ServiceTier = Literal["auto", "default", "flex", "scale", "priority"]


class Body(OwnParameters):
    """`model` has no effect where one model answers all, unless it names an adapter. What comes after it has none:
    nothing is stored here, and prefixes are found without a key."""

    model: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: ServiceTier | None = None


class Conversation(Body, WithTools):
    """Answers are text, and a `prediction` of one would only make it come sooner."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    prediction: dict[str, Any] | None = None


class Continuation(Body):
    """All of what is drawn is answered, and nothing else."""

    best_of: int | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def all_answered(self) -> "Continuation":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError(
                f"best_of must be n, {self.n or 1}: all answers that are drawn are given"
            )
        return self


class CompletionBody(Continuation):
    prompt: Prompt
    stream: Literal[False] | None = None


class ChatBody(Conversation):
    stream: Literal[False] | None = None


class Envelope(BaseModel):
    model_config = ConfigDict(extra="forbid")

    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/completions", "/v1/chat/completions"]
    body: dict[str, Any]


COLUMNS = frozenset(NativeRow.model_fields) | frozenset(Envelope.model_fields)
"""Names of Parquet columns that mean something."""


_INSTEAD = {
    "functions": 'give "tools"',
    "function_call": 'give "tool_choice"',
    "audio": "answers are text",
    "verbosity": "ask for it in a message",
    "web_search_options": "nothing is searched for here",
}
"""What to do about parameters of OpenAI's that would change an answer, and that there are none of here."""


def reasons(error: ValidationError) -> str:
    """What is wrong with a row, in one line that names each field."""
    found = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            told = _INSTEAD.get(name)
            found.append(f"unknown parameter {name!r}" + (f": {told}" if told else ""))
        else:
            found.append(f"{name}: {problem['msg']}" if name else problem["msg"])
    return "; ".join(found)
