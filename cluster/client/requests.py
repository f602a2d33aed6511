"""From Python values to messages. Parameters have the names of HTTP."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast
from uuid import uuid4

from headrace.cluster.serving.rpc import inference_pb2 as pb
from headrace.scheduler.errors import RequestError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids, or messages such as {"role": "user", "content": "Hello"}."""

_PRIORITIES = {"interactive": pb.PRIORITY_INTERACTIVE, "batch": pb.PRIORITY_BATCH}


def generate_request(prompt: Prompt, given: Mapping[str, Any]) -> pb.GenerateRequest:
    """RequestError for a parameter that is unknown or of another type."""
    request = pb.GenerateRequest(request_id=given.get("request_id") or uuid4().hex)
    _set_prompt(request, prompt)
    for name, value in given.items():
        if value is None or name == "request_id":
            continue
        try:
            _set(request, name, value)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(f"{name}: {error}", name) from error
    return request


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    try:
        if isinstance(prompt, str):
            request.text = prompt
        elif prompt and isinstance(prompt[0], Mapping):
            messages = cast(Sequence[Mapping[str, Any]], prompt)
            request.messages.messages.extend(_message(each) for each in messages)
        else:
            request.token_ids.ids.extend(cast(Sequence[int], prompt))
            request.token_ids.SetInParent()
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RequestError(f"prompt: {error}", "prompt") from error


def _set(request: pb.GenerateRequest, name: str, value: Any) -> None:
    if name == "stop":
        request.stop.extend([value] if isinstance(value, str) else value)
    elif name == "stop_token_ids":
        request.stop_token_ids.extend(value)
    elif name == "logit_bias":
        request.logit_bias.update({int(token): bias for token, bias in value.items()})
    elif name == "priority":
        request.priority = _PRIORITIES[str(getattr(value, "value", value))]
    elif name == "structured_outputs":
        request.structured_outputs.CopyFrom(_form(value))
    elif name == "tools":
        request.tools.extend(_tool(each["function"]) for each in value)
    elif name == "tool_choice":
        request.tool_choice.CopyFrom(_choice(value))
    elif name == "chat_template_kwargs":
        request.chat_template_kwargs = json.dumps(value)
    elif name in _SCALARS:
        setattr(request, name, value)
    else:
        raise TypeError("there is no such parameter")


_SCALARS = frozenset(
    field.name
    for field in pb.GenerateRequest.DESCRIPTOR.fields
    if field.message_type is None and not field.is_repeated
) - {"text"}


def _message(message: Mapping[str, Any]) -> pb.Message:
    given = {name: value for name, value in message.items() if value is not None}
    calls = [pb.ToolCall(id=call["id"], **call["function"]) for call in given.pop("tool_calls", ())]
    return pb.Message(**given, tool_calls=calls)


def _form(form: Mapping[str, Any]) -> pb.StructuredOutputs:
    given = {name: value for name, value in form.items() if value is not None}
    if "json" in given and not isinstance(given["json"], str):
        given["json"] = json.dumps(given["json"])
    if "choice" in given:
        given["choice"] = pb.Choice(texts=given["choice"])
    if len(given) != 1:
        raise ValueError("give one of json, regex, choice, grammar and json_object")
    return pb.StructuredOutputs(**given)


def _tool(function: Mapping[str, Any]) -> pb.Tool:
    given = dict(function)
    if given.get("parameters") is not None:
        given["parameters"] = json.dumps(given["parameters"])
    return pb.Tool(**given)


def _choice(choice: str | Mapping[str, Any]) -> pb.ToolChoice:
    if isinstance(choice, str):
        return pb.ToolChoice(mode=choice)
    return pb.ToolChoice(function=choice["function"]["name"])
