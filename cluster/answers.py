"""Rows of a job's output: answers and quarantined rows, native or as OpenAI Batch writes them.

Nothing here depends on when or in which run a row was answered, so that a resumed job writes what
an uninterrupted one would have written; `created` is the job's, not the row's.
"""

import json
from collections.abc import Sequence
from typing import Any

from headrace.cluster.completion import Completion
from headrace.cluster.logprobs import LogprobLists
from headrace.cluster.rows import Kind, Row, Tokenizer
from headrace.cluster.tools.calls import Said
from headrace.scheduler.request import FinishReason, SamplingParams


def answer(
    row: Row, completions: Sequence[Completion], tokenizer: Tokenizer, model: str, created: int
) -> dict[str, Any]:
    """The output row. `completions` are the row's n samples in order; `created` is Unix seconds."""
    choices = []
    for i, done in enumerate(completions):
        said = row.tools.read(done.text, f"{row.key:016x} {i}") if row.tools else None
        choices.append(choice(row.kind, i, done, tokenizer, row.params, said))
    usage = usage_of(completions[:1], completions)
    if row.kind is Kind.NATIVE:
        if len(choices) > 1:
            return {"id": row.id, "choices": choices, "usage": usage}
        del choices[0]["index"]
        return {"id": row.id, **choices[0], "usage": usage}
    name = f"{row.key:016x}"
    body = {**envelope(row.kind, name, model, created), "choices": choices, "usage": usage}
    return {
        "id": f"batch_req_{name}",
        "custom_id": row.id,
        "response": {"status_code": 200, "request_id": f"req_{name}", "body": body},
        "error": None,
    }


def refusal(number: int, row_id: str | int | None, batch: bool, reason: str) -> dict[str, Any]:
    """The quarantined row. `number` is its line in the input; `row_id` None if none was found."""
    if not batch:
        return {"id": row_id, "line": number, "error": reason}
    error = {"code": "invalid_request", "message": reason, "line": number}
    return {
        "id": f"batch_req_line_{number}",
        "custom_id": row_id,
        "response": None,
        "error": error,
    }


def encode(row: dict[str, Any]) -> bytes:
    """One line of JSON. A lone surrogate, which UTF-8 cannot hold, becomes its JSON escape."""
    text = json.dumps(row, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def envelope(kind: Kind, name: str, model: str, created: int) -> dict[str, Any]:
    """What OpenAI's answers begin with. `name` makes the id unique."""
    chat = kind is Kind.CHAT
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
    }


def usage_of(prompts: Sequence[Completion], completions: Sequence[Completion]) -> dict[str, int]:
    """Tokens of an answer; `prompts` has one of the samples of each prompt."""
    prompt = sum(done.num_prompt for done in prompts)
    output = sum(len(done.token_ids) for done in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
    }


def choice(
    kind: Kind,
    index: int,
    done: Completion,
    tokenizer: Tokenizer,
    params: SamplingParams,
    said: Said | None = None,
) -> dict[str, Any]:
    """One sample, drawn by `params`, as `choices` lists it; what was `said` where it may have calls in it."""
    made: dict[str, Any] = {"index": index}
    text = done.text if said is None else said.content
    calls = [call.listed() for call in said.calls] if said else []
    if kind is Kind.CHAT:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if said is not None and said.reasoning:
            message["reasoning_content"] = said.reasoning
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        made["message"] = message
    else:
        made["text"] = text
        if calls:
            made["tool_calls"] = calls
    if kind is not Kind.NATIVE:
        made["logprobs"] = None
    if done.logprobs is not None:
        made["logprobs"] = LogprobLists(tokenizer, params).listed(kind, done.logprobs)
    made["finish_reason"] = finish_reason(done, bool(calls))
    return made


def finish_reason(done: Completion, has_calls: bool) -> str:
    if has_calls and done.finish_reason == FinishReason.STOP.value:
        return "tool_calls"
    return done.finish_reason
