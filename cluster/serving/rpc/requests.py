"""From messages to bodies as HTTP has them, which one reader checks. Slow for long prompts: not for the
event loop."""

from typing import Any

from headrace.cluster.json_text import read_json
from headrace.cluster.serving.bodies import MAX_MESSAGES
from headrace.cluster.serving.reader import Reader, Work
from headrace.cluster.serving.rpc import inference_pb2 as pb
from headrace.cluster.tools.models import MAX_TOOLS
from headrace.scheduler.errors import RequestError

MAX_REQUEST_ID = 128

_SAME = frozenset(
    {
        *("model", "text", "n", "max_tokens", "temperature", "top_k", "top_p", "min_p"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "logprobs"),
        *("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "keep_context"),
        *("adapter",),
        *("max_ttft_ms", "deadline_ms", "parallel_tool_calls"),
    }
)
"""Fields that need no translation."""

_PRIORITIES = {pb.PRIORITY_INTERACTIVE: "interactive", pb.PRIORITY_BATCH: "batch"}


def read_request(reader: Reader, request: pb.GenerateRequest, tenant: str) -> Work:
    """Raises what the reader does."""
    if len(request.request_id) > MAX_REQUEST_ID:
        raise RequestError(f"request_id may have {MAX_REQUEST_ID} characters at most", "request_id")
    given = body_of(request)
    return (
        reader.chat_of(given, tenant)
        if "messages" in given
        else reader.completion_of(given, tenant)
    )


def body_of(request: pb.GenerateRequest) -> dict[str, Any]:
    """What is set of a request, under the names of HTTP."""
    body: dict[str, Any] = {}
    for field, value in request.ListFields():
        name = field.name
        if name in _SAME:
            body["prompt" if name == "text" else name] = value
        elif name == "token_ids":
            body["prompt"] = list(value.ids)
        elif name == "messages":
            # One more than may be is enough to be refused.
            body["messages"] = [_message(each) for each in value.messages[: MAX_MESSAGES + 1]]
        elif name in ("stop", "stop_token_ids"):
            body[name] = list(value)
        elif name == "logit_bias":
            body[name] = dict(value)
        elif name == "priority":
            body[name] = _PRIORITIES.get(value, value)
        elif name == "structured_outputs":
            body[name] = _form(value)
        elif name == "tools":
            body[name] = [_tool(each) for each in value[: MAX_TOOLS + 1]]
        elif name == "tool_choice":
            body[name] = _choice(value)
        elif name == "chat_template_kwargs":
            body[name] = _object(value, name)
        else:
            assert name == "request_id", name
    return body


def _message(message: pb.Message) -> dict[str, Any]:
    body = {field.name: value for field, value in message.ListFields()}
    body["role"] = message.role
    if message.tool_calls:
        body["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    return body


def _form(form: pb.StructuredOutputs) -> dict[str, Any]:
    name = form.WhichOneof("form")
    if name is None:
        return {}
    return {name: list(form.choice.texts) if name == "choice" else getattr(form, name)}


def _tool(tool: pb.Tool) -> dict[str, Any]:
    function: dict[str, Any] = {field.name: value for field, value in tool.ListFields()}
    function["name"] = tool.name
    if tool.HasField("parameters"):
        function["parameters"] = _object(tool.parameters, "tools")
    return {"type": "function", "function": function}


def _choice(choice: pb.ToolChoice) -> Any:
    if choice.WhichOneof("choice") == "function":
        return {"type": "function", "function": {"name": choice.function}}
    return choice.mode


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        value = read_json(text)
    except ValueError as error:
        raise RequestError(f"{name}: not valid JSON: {error}", name) from error
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be a JSON object, not {type(value).__name__}", name)
    return value
