"""What clients may send. An unknown name is an error that names it; nothing is ignored silently."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from headrace.cluster.row_models import (
    Continuation,
    Conversation,
    Message,
    ServiceTier,
    TokenId,
)
from headrace.cluster.serving.terms import MAX_MS, Terms
from headrace.cluster.tools.models import Tools
from headrace.scheduler.request import Priority

MAX_PROMPTS = 1024
MAX_MESSAGES = 8192

Tokens = Annotated[list[TokenId], Field(fail_fast=True)]
Prompts = (
    str
    | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
)
"""The first wrong item of a list ends it: there may be millions, and nobody else runs meanwhile."""

Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


Milliseconds = Annotated[int, Field(ge=1, le=MAX_MS)]


class Urgency(BaseModel):
    """In which class a request goes, and by when it wants its first token and all of its answer."""

    priority: Priority | None = None
    service_tier: ServiceTier | None = None
    max_ttft_ms: Milliseconds | None = None
    deadline_ms: Milliseconds | None = None

    @model_validator(mode="after")
    def one_priority(self) -> "Urgency":
        if self.service_tier == "flex" and self.priority is Priority.INTERACTIVE:
            raise ValueError('service_tier "flex" is priority "batch": give one of them')
        is_batch = self.priority is Priority.BATCH
        if self.service_tier in ("default", "scale", "priority") and is_batch:
            tier = self.service_tier
            raise ValueError(f'service_tier "{tier}" is priority "interactive": give one of them')
        return self

    @property
    def terms(self) -> Terms:
        tier = Priority.BATCH if self.service_tier == "flex" else Priority.INTERACTIVE
        seconds = [None if ms is None else ms / 1e3 for ms in (self.max_ttft_ms, self.deadline_ms)]
        return Terms(self.priority or tier, 1, *seconds)


class CompletionRequest(Continuation, Urgency):
    prompt: Prompts
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        single = isinstance(self.prompt[0], int)
        prompts: Any = [self.prompt] if single else self.prompt
        return list(prompts)


class ChatRequest(Conversation, Urgency):
    messages: Messages
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def one_text(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError('give either "prompt" or "messages"')
        if self.messages is None and self.tools:
            raise ValueError('tools need "messages"')
        return self


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    tokens: Tokens
