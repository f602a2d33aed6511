"""Tools by OpenAI's client: calls that are forced of the bundled model, and that an echo gives back."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from served import MODEL, EchoEngine, Served, serving, stories_engine

TEMPLATE = (
    "{% if tools %}Tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}{{ '\\n' }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function.name }}"
    " {{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ECHO = "{{ messages[-1].content }}{% if tools and 0 %}<tool_call>{% endif %}"
TALK: Any = [{"role": "user", "content": "What is the weather?"}]
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 4},
        "unit": {"enum": ["celsius", "kelvin"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Any = None) -> Any:
    function = {"name": name, "description": "It does.", "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [tool("weather", WEATHER), tool("now")]
NAMED = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def served(stories: Path) -> Iterator[Served]:
    with stories_engine(stories) as engine:
        engine.tokenizer.chat_template = TEMPLATE
        with serving(engine) as made:
            yield made


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with client_of(served) as made:
        yield made


@contextmanager
def client_of(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, **given: Any) -> Any:
    given = {"model": MODEL, "messages": TALK, "tools": TOOLS, **given}
    return client.chat.completions.create(**given)


def check(call: Any) -> None:
    assert call.type == "function"
    schema = WEATHER if call.function.name == "weather" else {"const": {}}
    jsonschema.validate(json.loads(call.function.arguments), schema)


def streamed(chunks: Any) -> tuple[str, list[tuple[str, str, str]], str]:
    """Content, (id, name, arguments) of all calls, and the reason, put together as clients do it."""
    content, reason = "", ""
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for delta in choice.delta.tool_calls or ():
                parts = calls.setdefault(delta.index, ["", "", ""])
                parts[0] += delta.id or ""
                parts[1] += delta.function.name or ""
                parts[2] += delta.function.arguments or ""
    assert list(calls) == list(range(len(calls)))
    return content, [(a, b, c) for a, b, c in calls.values()], reason


@pytest.mark.parametrize("given", [{"temperature": 0}, {"seed": 1}])
def test_a_call_that_is_required_is_well_formed(client: openai.OpenAI, given: Any) -> None:
    given = {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 90, **given}
    choice = chat(client, **given).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    check(call)
    content, calls, reason = streamed(chat(client, stream=True, **given))
    assert (content, reason) == ("", "tool_calls")
    assert [each[1:] for each in calls] == [(call.function.name, call.function.arguments)]


def test_a_named_function_is_called(client: openai.OpenAI) -> None:
    choice = chat(client, tool_choice=NAMED, seed=1, n=2, max_tokens=90).choices[1]
    [call] = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("now", "{}")
    assert choice.finish_reason == "tool_calls"


def test_a_call_that_is_cut_is_none(client: openai.OpenAI) -> None:
    choice = chat(client, tool_choice="required", temperature=0, max_tokens=8).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert choice.message.content.startswith("<tool_call>")


def test_tools_that_are_not_called_change_the_prompt_alone(
    client: openai.OpenAI, served: Served
) -> None:
    told = "Tools: weather now\n<|im_start|>user\nWhat is the weather?<|im_end|>\n<|im_start|>assistant\n"
    text = client.completions.create(model=MODEL, prompt=told, max_tokens=8, temperature=0)
    for choice in ("auto", None):
        more = {"tool_choice": choice} if choice else {}
        answer = chat(client, max_tokens=8, temperature=0, **more).choices[0]
        assert answer.message.content == text.choices[0].text
        assert (answer.message.tool_calls, answer.finish_reason) == (None, "length")
    plain = chat(client, max_tokens=8, temperature=0, tool_choice="none")
    assert plain.choices == chat(client, tools=openai.omit, max_tokens=8, temperature=0).choices
    count = served.ask("POST", "/tokenize", {"messages": TALK, "tools": TOOLS})[1]["tokens"]
    assert served.ask("POST", "/detokenize", {"tokens": count})[1]["prompt"] == told


def test_what_tools_answered_is_told(served: Served, client: openai.OpenAI) -> None:
    function = {"name": "weather", "arguments": '{"city": "Ulm"}'}
    messages = [
        *TALK,
        {"role": "assistant", "content": None,
         "tool_calls": [{"id": "call_1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]  # fmt: skip
    tokens = served.ask("POST", "/tokenize", {"messages": messages})[1]["tokens"]
    text = served.ask("POST", "/detokenize", {"tokens": tokens})[1]["prompt"]
    assert (
        '\n<tool_call>weather {"city": "Ulm"}</tool_call><|im_end|>\n<|im_start|>tool\nsunny'
        in text
    )
    assert chat(client, messages=messages, max_tokens=1).choices
    function["arguments"] = '{"city": '
    with pytest.raises(openai.BadRequestError, match="tool_calls must have") as caught:
        chat(client, messages=messages)
    assert caught.value.param == "messages"


def test_calls_among_text_whole_and_streamed(tokenizer: Any) -> None:
    text = (
        'So.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    )
    tokenizer.chat_template, before = ECHO, tokenizer.chat_template
    try:
        messages = [{"role": "user", "content": text}]
        engine = EchoEngine(tokenizer, max_context=4000)
        with serving(engine) as served, client_of(served) as client:
            choice = chat(client, messages=messages).choices[0]
            found = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls]
            assert found == [("weather", '{"city": "Köln"}'), ("now", "{}")]
            assert choice.message.content == "So."
            assert choice.finish_reason == "length"  # an echo ends by no token
            content, calls, _ = streamed(chat(client, messages=messages, stream=True))
            assert (content, [each[1:] for each in calls]) == ("So.", found)
            assert len({each[0] for each in calls}) == 2
            one = chat(client, messages=messages, parallel_tool_calls=False).choices[0].message
            assert [call.function.name for call in one.tool_calls] == ["weather"]
            none = chat(client, messages=messages, tool_choice="none").choices[0].message
            assert (none.content, none.tool_calls) == (text, None)
    finally:
        tokenizer.chat_template = before


@pytest.mark.parametrize(
    ("given", "param", "reason"),
    [
        ({"tools": []}, "tools", "at least 1"),
        ({"tools": openai.omit, "tool_choice": "auto"}, "tool_choice", "needs tools"),
        ({"tools": openai.omit, "parallel_tool_calls": True}, "parallel_tool_calls", "needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "'x'"),
        ({"tools": [tool("a"), tool("a")]}, "tools", "same name"),
        ({"tools": [tool("a b")]}, "tools", "pattern"),
        ({"tools": [{"type": "web_search"}]}, "tools", "function"),
        ({"tools": [tool(f"t{i}") for i in range(129)]}, "tools", "128"),
        ({"tool_choice": "required", "tools": [tool("a", {"type": "odd"})]}, "tools", "odd"),
        ({"tool_choice": "required", "tools": [tool("a", {"not": {}})]}, "tools", "Unimplemented"),
        ({"response_format": {"type": "json_object"}}, "response_format", "exclude each other"),
    ],
)
def test_what_is_wrong_is_named(client: openai.OpenAI, given: Any, param: str, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        chat(client, **given)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("template", "param", "reason"),
    [
        ("{{ messages[0].content }}", "tools", "no place for tools"),
        ("{{ messages[0].content }}{{ tools }}", "tool_choice", "not known here"),
    ],
)
def test_models_that_know_no_tools(
    served: Served, client: openai.OpenAI, template: str, param: str, reason: str
) -> None:
    tokenizer = served.engine.tokenizer
    tokenizer.chat_template, before = template, tokenizer.chat_template
    try:
        with pytest.raises(openai.BadRequestError, match=reason) as caught:
            chat(client)
        assert caught.value.param == param
        if param == "tool_choice":  # but they can be made to call
            choice = chat(client, tool_choice=NAMED, max_tokens=60).choices[0]
            assert choice.message.tool_calls[0].function.name == "now"
    finally:
        tokenizer.chat_template = before
