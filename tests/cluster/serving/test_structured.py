"""Answers of a form that a client asks for, by the client's own means."""

import json
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel
from served import MODEL, EchoEngine, Served, serving

TALK: Any = [{"role": "user", "content": "Who lives here?"}]


class Person(BaseModel):
    name: str
    mood: Literal["glad", "sad"]
    lucky: list[bool]


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["dog", "cat", "bird"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 4},
        "name": {"type": "string", "maxLength": 12},
    },
    "required": ["kind", "legs", "name"],
    "additionalProperties": False,
}


def json_schema(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def chat(client: openai.OpenAI, **given: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": TALK, **given})


def test_answers_follow_a_schema_whole_and_streamed(client: openai.OpenAI) -> None:
    given = {"response_format": json_schema(SCHEMA), "seed": 1, "n": 4, "max_tokens": 80}
    whole = chat(client, **given)
    texts = [choice.message.content for choice in whole.choices]
    assert {choice.finish_reason for choice in whole.choices} == {"stop"}
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len({*texts}) > 1
    streamed = [""] * 4
    for chunk in chat(client, stream=True, **given):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_a_pydantic_model_comes_back(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=TALK, response_format=Person, temperature=0.8, seed=3, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_an_answer_that_is_cut_is_of_length(client: openai.OpenAI) -> None:
    choice = chat(client, response_format=json_schema(SCHEMA), max_tokens=5).choices[0]
    assert choice.finish_reason == "length"


def test_any_object(client: openai.OpenAI) -> None:
    choice = chat(client, response_format={"type": "json_object"}, temperature=0, max_tokens=400)
    assert isinstance(json.loads(choice.choices[0].message.content), dict)
    plain = chat(client, response_format={"type": "text"}, temperature=0, max_tokens=8)
    assert plain.choices[0] == chat(client, temperature=0, max_tokens=8).choices[0]


@pytest.mark.parametrize(
    ("form", "answers"),
    [
        ({"choice": ["yes", "no"]}, {"yes", "no"}),
        ({"regex": "[ab]"}, {"a", "b"}),
        ({"grammar": 'start: "one" | "two"'}, {"one", "two"}),
        ({"json": {"const": "a \\ b"}}, {r'"a \\ b"'}),
    ],
)
def test_forms_by_the_names_of_vllm(client: openai.OpenAI, form: Any, answers: set[str]) -> None:
    extra = {"structured_outputs": form}
    assert chat(client, temperature=0, extra_body=extra).choices[0].message.content in answers
    text = client.completions.create(model=MODEL, prompt="It", extra_body=extra).choices[0].text
    assert text in answers


def test_a_bias_forces_and_forbids_tokens(client: openai.OpenAI, served: Served) -> None:
    def text(bias: dict[str, int]) -> str:
        given = {"max_tokens": 4, "temperature": 0, "logit_bias": bias}
        return str(client.completions.create(model=MODEL, prompt="Once", **given).choices[0].text)

    dog = served.tokens(" dog")
    assert text({str(dog[0]): 100}) == 4 * " dog"
    first = served.tokens(text({}))[0]
    assert served.tokens(text({str(first): -100}))[0] != first


@pytest.mark.parametrize(
    ("given", "param", "reason"),
    [
        ({"response_format": json_schema({"not": {}})}, "response_format", "Unimplemented"),
        ({"response_format": json_schema({"type": "odd"})}, "response_format", "odd"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "required"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs", "regex"),
        ({"extra_body": {"structured_outputs": {"xml": "a"}}}, "structured_outputs", "xml"),
        ({"extra_body": {"structured_outputs": {}}}, "structured_outputs", "takes one of"),
        (
            {
                "response_format": {"type": "json_object"},
                "extra_body": {"structured_outputs": {"regex": "a"}},
            },
            "response_format",
            "either",
        ),
        (
            {"response_format": {"type": "text", **{f"k{i}": 1 for i in range(100)}}},
            None,
            "64 names",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_named(
    client: openai.OpenAI, given: Any, param: str | None, reason: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        chat(client, **given)
    assert caught.value.param == param


def test_an_answer_that_cannot_go_on_is_the_clients_error(tokenizer: Any) -> None:
    reason = "the answer cannot follow its grammar further: too complex"
    with (
        serving(EchoEngine(tokenizer, error=reason)) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="too complex"):
            chat(client, n=2)
        with pytest.raises(openai.APIError, match="too complex"):
            list(chat(client, stream=True))
        assert served.metric("headrace_running_sequences") == 0
