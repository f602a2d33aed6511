"""Calls in what a model says, whole or as it says it."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from headrace.cluster.tools.formats import Format
from headrace.scheduler.errors import RequestError


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` are JSON, as text."""

    id: str
    name: str
    arguments: str

    def listed(self, **more: Any) -> dict[str, Any]:
        """As OpenAI's answers list it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {**more, "id": self.id, "type": "function", "function": function}


@dataclass(slots=True)
class Said:
    """`reasoning` is what a tokenizer's own template tells from the answer."""

    content: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def add(self, more: "Said") -> None:
        self.content += more.content
        self.reasoning += more.reasoning
        self.calls += more.calls


class CallReader:
    """Tells calls from text, in pieces of any length. What only looks like a call is text.

    Nothing that was given out is taken back, and a call is given out when it is complete.
    """

    def __init__(
        self,
        template: dict[str, Any],
        form: Format | None,
        *,
        prefix: str,
        tools: Sequence[dict[str, Any]],
        name: str,
        most: int | None = None,
    ) -> None:
        """`form` is of our own templates that are of one. `prefix` is the prompt from where the answer's
        turn begins; `name` makes ids unique. Calls beyond `most` are left out."""
        self._form, self._name, self._most = form, name, most
        self._template, self._tools = template, list(tools)
        loaded = read_template(template)
        calls = loaded.fields.get("tool_calls")
        self._open: Any = calls and calls.open_re
        self._ends: Any = calls and calls.close_re
        self._parser = response_parser(loaded, prefix=prefix)
        self._count = 0
        self._text, self._at = "", 0  # all that was read, and how far it was given out
        self._begun, self._raw = (
            0,
            "",
        )  # the call that is being said: where it begins, and its inside

    def feed(self, text: str) -> Said:
        self._text += text
        return self._take(self._parser.feed(text))

    def finish(self) -> Said:
        """What was held back; nothing may follow."""
        return self._take(self._parser.finalize()[1])

    def _take(self, events: list[dict[str, Any]]) -> Said:
        said = Said()
        for event in events:
            kind, name = event["type"], event["field"]
            if kind == "region_open" and name == "tool_calls":
                self._begin()
            elif kind == "region_chunk":
                self._at = self._text.index(event["text"], self._at) + len(event["text"])
                if name == "tool_calls":
                    self._raw += event["text"]
                elif name == "content":
                    said.content += event["text"]
                else:
                    said.reasoning += event["text"]
            elif kind == "region_close" and name == "tool_calls":
                self._end(said)
        return said

    def _begin(self) -> None:
        mark = self._open.search(self._text, self._at) if self._open else None
        self._begun, self._at = mark.span() if mark else (self._at, self._at)
        self._raw = ""

    def _end(self, said: Said) -> None:
        """Give out the call, or the text that is none."""
        mark = self._ends.search(self._text, self._at) if self._ends else None
        self._at = mark.end() if mark else self._at
        whole = self._text[self._begun : self._at]
        if self._form is not None:
            found = calls_in(self._raw, self._form)
        else:  # one that was cut has no end
            found = None if self._ends and not mark else self._read(whole)
        if found is None:
            said.content += whole
            return
        left = None if self._most is None else self._most - self._count
        calls = [(name, json.dumps(given, ensure_ascii=False)) for name, given in found[:left]]
        said.calls += [ToolCall(self._id(), name, given) for name, given in calls]

    def _read(self, call: str) -> list[tuple[str, Any]] | None:
        from transformers.utils.chat_parsing import parse_response

        try:
            read = parse_response(call, self._template, prefix="", tools=self._tools)
        except (ValueError, KeyError, RecursionError):
            return None
        return _calls_of(read.get("tool_calls"))

    def _id(self) -> str:
        self._count += 1
        seed = f"{self._name} {self._count}".encode()
        digest = hashlib.blake2b(seed, digest_size=12).hexdigest()
        length = self._form.id_length if self._form else 24
        return f"call_{digest}" if length == 24 else digest[:length]


def read_template(template: dict[str, Any]) -> Any:
    """RequestError for a tokenizer's own that transformers cannot read, and for a transformers that reads
    none."""
    try:
        from transformers.utils.chat_parsing.response_templates import load_response_template
    except ImportError as error:
        raise RequestError(
            "tools need transformers 5.23 or later on the server", "tools"
        ) from error

    try:
        return load_response_template(template)
    except ValueError as error:
        raise RequestError(f"the model's response_template is wrong: {error}", "tools") from error


def response_parser(template: Any, prefix: str) -> Any:
    """One that tells fields apart and takes all of them for text, so that nothing is an error."""
    from transformers.utils.chat_parsing import ResponseParser  # no driver needs it before

    as_text: dict[str, Any] = {
        "content": "text",
        "content_args": {},
        "transform": None,
        "transform_each": False,
    }
    fields = {
        name: replace(field, **as_text, join=None, optional=True)
        for name, field in template.fields.items()
    }
    return ResponseParser(replace(template, fields=fields), prefix=prefix)


def calls_in(text: str, form: Format) -> list[tuple[str, Any]] | None:
    """Names and arguments of the calls that `text` is made of; None when it is anything else."""
    if form.parts:
        return _named(text, form.before, form.parts)
    values = _values(text.strip())
    if values is None:
        return None
    found = [_call(value) for value in values]
    return None if None in found or not found else [call for call in found if call]


def _named(text: str, mark: str, parts: str) -> list[tuple[str, Any]] | None:
    found = []
    for piece in text.split(mark):
        name, between, arguments = piece.strip().partition(parts)
        values = _values(arguments.strip()) if between and name else None
        if not values or len(values) != 1 or not isinstance(values[0], dict):
            return None
        found.append((name.strip(), values[0]))
    return found


def _values(text: str) -> list[Any] | None:
    """JSON values one after the other, and what is in lists of them."""
    found: list[Any] = []
    at, decoder = 0, json.JSONDecoder()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        found += value if isinstance(value, list) else [value]
        gap = re.compile(r"[\s;,]*").match(text, at)
        at = gap.end() if gap else at
    return found


def _call(value: Any) -> tuple[str, Any] | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return (value["name"], arguments) if isinstance(arguments, dict) else None


def _calls_of(value: Any) -> list[tuple[str, Any]] | None:
    """What transformers made of a call."""
    found = []
    for each in value if isinstance(value, list) else [value]:
        call = _call(each.get("function", each)) if isinstance(each, dict) else None
        if call is None:
            return None
        found.append(call)
    return found
