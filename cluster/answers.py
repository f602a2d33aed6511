"""Rows of a job's output: answers and quarantined rows, native or as OpenAI Batch writes them.

Nothing here depends on when or in which run a row was answered, so that a resumed job writes what
an uninterrupted one would have written; `created` is the job's, not the row's.
"""

import json
from collections.abc import Sequence
from typing import Any

from headrace.cluster.completion import Completion
from headrace.cluster.rows import Kind, Row, Tokenizer
from headrace.scheduler.plan import Sample


def answer(
    row: Row, completions: Sequence[Completion], tokenizer: Tokenizer, model: str, created: int
) -> dict[str, Any]:
    """The output row. `completions` are the row's n samples in order; `created` is Unix seconds."""
    choices = [_choice(row.kind, i, done, tokenizer) for i, done in enumerate(completions)]
    usage = _usage(completions)
    if row.kind is Kind.NATIVE:
        if len(choices) > 1:
            return {"id": row.id, "choices": choices, "usage": usage}
        del choices[0]["index"]
        return {"id": row.id, **choices[0], "usage": usage}
    chat = row.kind is Kind.CHAT
    name = f"{row.key:016x}"
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage,
    }
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


def _usage(completions: Sequence[Completion]) -> dict[str, int]:
    prompt = completions[0].num_prompt
    output = sum(len(done.token_ids) for done in completions)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
    }


def _choice(kind: Kind, index: int, done: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index}
    if kind is Kind.CHAT:
        choice["message"] = {"role": "assistant", "content": done.text}
    else:
        choice["text"] = done.text
    if kind is not Kind.NATIVE:
        choice["logprobs"] = None
    if done.logprobs is not None:
        listed = _completion_logprobs if kind is Kind.COMPLETION else _chat_logprobs
        choice["logprobs"] = listed(done.logprobs, tokenizer)
    choice["finish_reason"] = done.finish_reason
    return choice


def _chat_logprobs(samples: Sequence[Sample], tokenizer: Tokenizer) -> dict[str, Any]:
    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = tokenizer.decode([token])
        data = list(text.encode("utf-8", "replace"))
        return {"token": text, "logprob": logprob, "bytes": data}

    return {
        "content": [
            {
                **entry(sample.token, sample.logprob),
                "top_logprobs": [entry(token, logprob) for token, logprob in sample.top],
            }
            for sample in samples
        ]
    }


def _completion_logprobs(samples: Sequence[Sample], tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = [tokenizer.decode([sample.token]) for sample in samples]
    offsets = [sum(len(token) for token in tokens[:i]) for i in range(len(tokens))]
    top = [{tokenizer.decode([t]): value for t, value in sample.top} for sample in samples]
    return {
        "tokens": tokens,
        "token_logprobs": [sample.logprob for sample in samples],
        "top_logprobs": top,
        "text_offset": offsets,
    }
