"""How models write their calls, and grammars by which they cannot but write them so.

What is written is read by transformers' response templates, of which these are ours, for tokenizers
without one: https://huggingface.co/docs/transformers/chat_response_parsing
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.cluster.tools.models import Function

_CONTENT = {"content": "text"}


@dataclass(frozen=True, slots=True)
class Format:
    """`before` and `after` are the marks around what a call, or all of them, is written in; `pattern` finds
    the first, if it is not to be anywhere. A call's JSON names its arguments by `arguments`."""

    before: str
    after: str = ""
    arguments: str = "arguments"
    pattern: str | None = None
    is_list: bool = False
    may_repeat: bool = True
    id_length: int = 24
    parts: str | None = None
    """What stands between a function's name and its arguments, where a call is no JSON."""

    @property
    def template(self) -> dict[str, Any]:
        """Of a response, as transformers reads it."""
        calls: dict[str, Any] = {"repeats": True, "content": "text"}
        calls["open_pattern"] = self.pattern or rf"\s*{re.escape(self.before)}"
        if self.after:
            calls["close"] = self.after
        fields = {"tool_calls": calls, "content": _CONTENT}
        return {"start_anchor": "\0", "fields": fields}


TAGGED = Format("<tool_call>", "</tool_call>")
"""Hermes and Qwen: <tool_call>{"name": ..., "arguments": ...}</tool_call>"""

PLAIN = Format(
    "", arguments="parameters", pattern=r"\A\s*(?:<\|python_tag\|>)?(?=\{)", may_repeat=False
)
"""Llama 3: {"name": ..., "parameters": ...} and nothing else."""

LISTED = Format("[TOOL_CALLS]", is_list=True, id_length=9)
"""Mistral: [TOOL_CALLS][{"name": ..., "arguments": ...}, ...]"""

NAMED = Format("[TOOL_CALLS]", parts="[ARGS]", id_length=9)
"""Mistral since 2025: [TOOL_CALLS]name[ARGS]{...}[TOOL_CALLS]..."""

BARE = Format("", arguments="parameters", pattern=r"\A\s*(?=\[)", is_list=True)
"""For calls that are forced of a model whose own format is not known: vLLM's."""


def _template(opened: str, closed: str, **inside: Any) -> dict[str, Any]:
    """Where the name is in what opens a call."""
    calls: dict[str, Any] = {"open_pattern": opened, "close_pattern": closed, "repeats": True}
    function = {"name": "{name}", "arguments": "{content}"}
    calls |= {**inside, "transform": {"type": "function", "function": function}}
    return {"start_anchor": "\0", "fields": {"tool_calls": calls, "content": _CONTENT}}


TEMPLATES: dict[str, dict[str, Any]] = {
    # Qwen3-Coder, Qwen3.5: <tool_call><function=name><parameter=key>value</parameter></function>
    "<function=": _template(
        r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        r"</function>\s*</tool_call>",
        content="xml-inline",
        content_args={
            "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
        },
    ),
    # GLM-4.5: <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>
    "<arg_key>": _template(
        r"\s*<tool_call>\s*(?P<name>[^<\s]+)\s*(?=<arg_key>|</tool_call>)",
        "</tool_call>",
        content="xml-inline",
        content_args={
            "tag_pattern": r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"
        },
    ),
}
"""Responses with calls that are no JSON, by what is found in chat templates that show them."""


def known_template(chat_template: str) -> dict[str, Any] | None:
    """The one of TEMPLATES that a chat template shows."""
    shown = [mark for mark in TEMPLATES if mark in chat_template]
    return TEMPLATES[shown[0]] if shown else None


def known_format(chat_template: str) -> Format | None:
    """The one that a chat template shows; None when it is none of these."""
    if known_template(chat_template):
        return None
    if "[TOOL_CALLS]" in chat_template:
        return NAMED if "[ARGS]" in chat_template else LISTED
    if "<tool_call>" in chat_template:
        return TAGGED
    if "<|python_tag|>" in chat_template or '"parameters": dictionary' in chat_template:
        return PLAIN
    return None


def grammar(
    form: Format, functions: Sequence[Function], special: dict[str, int], *, parallel: bool
) -> str:
    """In Lark: one call at least of `functions`, with arguments that their schemas allow. `special` are
    tokens that are no text, by their names."""
    lines = []
    for i, function in enumerate(functions):
        lines.append(f"call{i}: {_call(form, function, f'args{i}', special)}")
        lines.append(f"args{i}: %json {_schema(function)}")
    before, after = _literal(form.before, special), _literal(form.after, special)
    repeats = parallel and form.may_repeat
    if form.is_list:
        more = '("," " "? call)*' if repeats else ""
        before += ' " "?' if before else ""
        start = f'{before} "[" call {more} "]" {after}'
    else:
        gap = '"\\n"' if form.after else ""
        start = f"call ({gap} call)*" if repeats else "call"
    names = " | ".join(f"call{i}" for i in range(len(functions)))
    return "\n".join([f"start: {start}", f"call: {names}", *lines])


def _call(form: Format, function: Function, args: str, special: dict[str, int]) -> str:
    before, after = _literal(form.before, special), _literal(form.after, special)
    name = json.dumps(function.name)
    if form.parts:
        return f"{before} {name} {_literal(form.parts, special)} {args}"
    opened = json.dumps(f'{{"name": {name}, "{form.arguments}": ')
    if form.is_list:
        return f'{opened} {args} "}}"'
    edge = '"\\n"' if form.after else ""
    return f'{before} {edge} {opened} {args} "}}" {edge} {after}'


def _schema(function: Function) -> str:
    given = function.parameters or {"type": "object", "properties": {}}
    schema = {"additionalProperties": False, **given} if not function.parameters else {**given}
    schema.setdefault("type", "object")
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": r" |\n[ \t]{0,20}"}})


def _literal(text: str, special: dict[str, int]) -> str:
    if not text:
        return ""
    return f"<[{special[text]}]>" if text in special else json.dumps(text)
