"""Calls are told from text in every format, however the text comes."""

import json
import random
from typing import Any

import jsonschema
import pytest

from headrace.cluster.grammars import Grammars
from headrace.cluster.tools import formats
from headrace.cluster.tools.calls import Said, ToolCall
from headrace.cluster.tools.formats import BARE, LISTED, NAMED, PLAIN, TAGGED, TEMPLATES, Format
from headrace.cluster.tools.models import Function
from headrace.cluster.tools.use import ToolUse
from headrace.scheduler.structured import StructuredOutputsParams

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}]
ONE = ("weather", {"city": "Ulm", "days": 2})
OTHER = ("now", {})
TAG, END = "<tool_call>\n", "\n</tool_call>"
ULM = '{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}'
NOW = '{"name": "now", "arguments": {}}'
XML = "<function=weather>\n<parameter=city>\nUlm\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
GLM = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Ulm</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
)


def use(form: Format | str, template: Any = None) -> ToolUse:
    if isinstance(form, str):
        return ToolUse(TOOLS, template or TEMPLATES[form], None, None, False)
    return ToolUse(TOOLS, form.template, form, None, False)


def in_pieces(which: ToolUse, text: str, seed: int) -> Said:
    chance, reader, said = random.Random(seed), which.reader("n"), Said()
    at = 0
    while at < len(text):
        size = chance.choice([1, 2, 3, 8, 30])
        said.add(reader.feed(text[at : at + size]))
        at += size
    said.add(reader.finish())
    return said


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (TAGGED, f"Let me see.\n{TAG}{ULM}{END}\n{TAG}{NOW}{END}", "Let me see.", [ONE, OTHER]),
        (TAGGED, f"{TAG}{ULM}", "", [ONE]),  # the model forgot to end it
        (TAGGED, "a <tool b", "a <tool b", []),
        (TAGGED, "<tool_call>odd</tool_call> so", "<tool_call>odd</tool_call> so", []),
        (TAGGED, f"{TAG}{ULM[:30]}", f"{TAG}{ULM[:30]}", []),
        (TAGGED, f"{TAG}[1, 2]{END}", f"{TAG}[1, 2]{END}", []),
        (PLAIN, ULM.replace("arguments", "parameters"), "", [ONE]),
        (PLAIN, f"<|python_tag|>{ULM}; {NOW}", "", [ONE, OTHER]),
        (PLAIN, f"It is {NOW}", f"It is {NOW}", []),
        (PLAIN, '{"answer": 42}', '{"answer": 42}', []),
        (PLAIN, "{", "{", []),
        (LISTED, f"[TOOL_CALLS][{ULM}, {NOW}]", "", [ONE, OTHER]),
        (LISTED, f"So:[TOOL_CALLS] [{NOW}]", "So:", [OTHER]),
        (LISTED, f"[TOOL_CALLS][{ULM[:9]}", f"[TOOL_CALLS][{ULM[:9]}", []),
        (NAMED, '[TOOL_CALLS]weather[ARGS]{"city": "Ulm", "days": 2}[TOOL_CALLS]now[ARGS]{}', "",
         [ONE, OTHER]),
        (NAMED, '[TOOL_CALLS]now[ARGS]{"', '[TOOL_CALLS]now[ARGS]{"', []),
        (BARE, f"[{ULM}]", "", [ONE]),
        ("<function=", f"Hm.\n{TAG}{XML}</function>{END}", "Hm.", [ONE]),
        ("<function=", f"Hm.\n{TAG}{XML}", f"Hm.\n{TAG}{XML}", []),
        ("<arg_key>", f"Hm.\n{GLM}\n{GLM}", "Hm.", [ONE, ONE]),
        ("<arg_key>", "<tool_call>now\n</tool_call>", "", [OTHER]),
        ("<arg_key>", GLM[:60], GLM[:60], []),
    ],
)  # fmt: skip
def test_calls_and_text(
    form: Format | str, text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    said = use(form).read(text, "n")
    assert [(call.name, json.loads(call.arguments)) for call in said.calls] == calls
    assert said.content == content
    for seed in range(12):
        assert in_pieces(use(form), text, seed) == said


def test_ids_are_of_the_answer_and_of_the_length_that_templates_take() -> None:
    text = f"[TOOL_CALLS][{NOW}, {NOW}]"
    first, second = use(LISTED).read(text, "n").calls
    assert {len(first.id), len(second.id)} == {9}
    assert first.id != second.id
    assert use(LISTED).read(text, "n").calls == [first, second]
    assert use(LISTED).read(text, "m").calls[0].id != first.id
    [call] = use(TAGGED).read(f"{TAG}{NOW}{END}", "n").calls
    assert call.id.startswith("call_")
    assert call == ToolCall(call.id, "now", "{}")


OWN = {
    "start_anchor": "<me>",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open": "<call>", "close": "</call>", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"</think>Yes<call>{ULM}</call>", "Yes", [ONE]),
        ("</think>Yes<call>{odd}</call> and", "Yes<call>{odd}</call> and", []),
        (f"</think>Yes<call>{ULM[:9]}", f"Yes<call>{ULM[:9]}", []),
    ],
)
def test_a_tokenizers_own_template(text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    class Tokenizer:
        def decode(self, token_ids: list[int]) -> str:
            return "long ago <me> is <you>\n<me><think>"

    which = use("", OWN).after([1], Tokenizer())
    said = which.read("so" + text, "n")
    assert [(call.name, json.loads(call.arguments)) for call in said.calls] == calls
    assert (said.content, said.reasoning) == (content, "so")


FUNCTIONS = [Function(name="weather", parameters=WEATHER), Function(name="now")]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("form", [TAGGED, PLAIN, LISTED, NAMED, BARE])
def test_who_must_call_calls_well(form: Format, parallel: bool, tokenizer: Any) -> None:
    grammars = Grammars(tokenizer, [0])
    text = formats.grammar(form, FUNCTIONS, {}, parallel=parallel)
    grammar = grammars.compiled(StructuredOutputsParams(grammar=text))
    most = 0
    for seed in range(8):
        said = use(form).read(babble(grammars, grammar.matcher.deep_copy(), tokenizer, seed), "n")
        assert not said.content and said.calls
        for call in said.calls:
            schema = WEATHER if call.name == "weather" else {"const": {}}
            jsonschema.validate(json.loads(call.arguments), schema)
        most = max(most, len(said.calls))
    assert (most > 1) == (parallel and form is not PLAIN)


def babble(grammars: Grammars, matcher: Any, tokenizer: Any, seed: int) -> str:
    """Whatever the grammar allows, but ends of words before everything else."""
    chance, tokens = random.Random(seed), []
    while not matcher.is_stopped():
        [words] = grammars.allowed([matcher])
        allowed = [i for i in range(len(tokenizer)) if words[i // 32] >> i % 32 & 1]
        if 0 in allowed and chance.random() < 0.7:
            break
        tokens.append(chance.choice([i for i in allowed if i] or allowed))
        assert matcher.consume_token(tokens[-1])
    return str(tokenizer.decode([token for token in tokens if token]))


def test_marks_that_are_no_text_are_tokens(tokenizer: Any) -> None:
    form = Format("<|im_start|>", "<|im_end|>")
    special = {"<|im_start|>": 2, "<|im_end|>": 3}
    text = formats.grammar(form, FUNCTIONS, special, parallel=False)
    assert "<[2]>" in text and "<[3]>" in text
    Grammars(tokenizer, [0]).compiled(StructuredOutputsParams(grammar=text))


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{% for tool in tools %}<tool_call>", TAGGED),
        ("{{ tools }}<tool_call><function=a>", None),
        ("{{ tools }}<tool_call>{name}<arg_key>", None),
        ("{{ tools }}[TOOL_CALLS]", LISTED),
        ("{{ tools }}[TOOL_CALLS] + [ARGS]", NAMED),
        ('{{ tools }}{"name": function name, "parameters": dictionary of argument name', PLAIN),
        ("{{ tools }}", None),
    ],
)
def test_formats_are_told_by_templates(template: str, form: Format | None) -> None:
    assert formats.known_format(template) == form
