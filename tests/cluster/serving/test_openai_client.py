"""A stranger's client, unchanged, against the bundled model."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from commands import wait_for
from served import MODEL, Served, stories_engine

from headrace.cluster.seeds import derive_seed
from headrace.scheduler.request import SamplingParams

PROMPT = "Once upon a time"
TALK: Any = [{"role": "user", "content": "Tell me a story."}]
CONTEXT = 1024


def complete(client: openai.OpenAI, **given: Any) -> Any:
    return client.completions.create(**{"model": MODEL, "prompt": PROMPT, **given})


def chat(client: openai.OpenAI, **given: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": TALK, **given})


def refused(call: Any, client: openai.OpenAI, **given: Any) -> Any:
    with pytest.raises(openai.APIStatusError) as caught:
        call(client, **given)
    return caught.value


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "headrace"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_completion_is_what_a_batch_job_answers(stories: Path, client: openai.OpenAI) -> None:
    answer = complete(client, max_tokens=12, seed=5)
    with stories_engine(stories) as engine:
        tokens = engine.tokenizer(PROMPT)["input_ids"]
        seed = derive_seed(engine.model_digest, 5, 0)
        engine.add(tokens, SamplingParams(max_tokens=12), seed)
        done = []
        while not done:
            done = engine.step()
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (done[0].text, "length")
    assert answer.object == "text_completion"
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(tokens),
        "completion_tokens": 12,
        "total_tokens": len(tokens) + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_prompts_of_every_shape(client: openai.OpenAI, served: Served) -> None:
    def texts(prompt: Any, n: int = 1) -> list[str]:
        answer = complete(client, prompt=prompt, n=n, max_tokens=4, temperature=0)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    ids = served.tokens(PROMPT)
    one, other = texts(PROMPT)[0], texts("The dog")[0]
    assert one != other
    assert texts(ids) == [one]
    assert texts([PROMPT, "The dog"], n=2) == [one, one, other, other]
    assert texts([ids, ids[:1]])[0] == one


def test_a_chat_goes_through_the_template(client: openai.OpenAI) -> None:
    told = "<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\n"
    text = complete(client, prompt=told, max_tokens=8, temperature=0).choices[0].text
    answer = chat(client, max_tokens=8, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == text
    parts = [{"role": "user", "content": [{"type": "text", "text": "Tell me a story."}]}]
    assert (
        chat(client, messages=parts, max_completion_tokens=8, temperature=0).choices[0]
        == (answer.choices[0])
    )


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.0},
        {"seed": 1, "n": 3},
        {"seed": 2, "temperature": 8.0, "max_tokens": 40},  # mostly halves of characters
        {"temperature": 0.0, "stop": [" small village", "zzz"]},
        {"temperature": 0.0, "stop": "e", "extra_body": {"include_stop_str_in_output": True}},
        {"seed": 3, "temperature": 8.0, "extra_body": {"skip_special_tokens": False}},
    ],
)
def test_a_stream_is_the_whole_text(client: openai.OpenAI, given: Any) -> None:
    given = {"max_tokens": 16, **given}
    whole = complete(client, **given)
    streamed = [""] * given.get("n", 1)
    reasons = [""] * len(streamed)
    for chunk in complete(client, stream=True, **given):
        assert chunk.usage is None
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert streamed == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_a_stop_string_ends_a_text_and_does_not_show(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=16, temperature=0).choices[0].text
    assert " village" in whole
    choice = complete(client, max_tokens=16, temperature=0, stop=" village").choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == whole.partition(" village")[0]


def test_a_chat_streams_roles_texts_and_usage(client: openai.OpenAI) -> None:
    given = {"max_tokens": 6, "n": 2, "seed": 4}
    whole = chat(client, **given)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **given))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [choice for chunk in chunks for choice in chunk.choices]
    assert [(d.index, d.delta.role) for d in deltas if d.delta.role] == [
        (0, "assistant"),
        (1, "assistant"),
    ]
    for index, choice in enumerate(whole.choices):
        mine = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.delta.content or "" for delta in mine) == choice.message.content
        assert [delta.finish_reason for delta in mine if delta.finish_reason] == ["length"]
    assert not chunks[-1].choices
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 12


def test_seeds_decide_and_nothing_else_does(client: openai.OpenAI) -> None:
    def text(**given: Any) -> str:
        return str(complete(client, max_tokens=12, **given).choices[0].text)

    assert text(seed=7) == text(seed=7)
    assert len({text(seed=seed) for seed in range(4)}) > 1
    assert len({text() for _ in range(4)}) > 1


@pytest.mark.parametrize("of_chat", [False, True])
def test_tokens_that_were_found_are_counted(client: openai.OpenAI, of_chat: bool) -> None:
    text = f"The dog {'sat' if of_chat else 'ran'}. " * 60
    given = {"messages": [{"role": "user", "content": text}]} if of_chat else {"prompt": text}
    ask = partial(chat if of_chat else complete, client, **given, max_tokens=2)
    first, again = ask().usage, ask(n=2).usage
    *_, last = ask(stream=True, stream_options={"include_usage": True})
    assert first.prompt_tokens_details.cached_tokens == 0
    full = (first.prompt_tokens - 1) // 64 * 64
    assert full and again.prompt_tokens_details.cached_tokens == full
    assert last.usage.prompt_tokens_details.cached_tokens == full


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    given = {"max_tokens": 5, "temperature": 0, "logprobs": 2}
    listed = complete(client, **given).choices[0]
    found = listed.logprobs
    assert "".join(found.tokens) == listed.text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(5)]
    assert [max(top.values()) for top in found.top_logprobs] == found.token_logprobs
    assert {len(top) for top in found.top_logprobs} == {2}
    parts = [c.choices[0].logprobs for c in complete(client, stream=True, **given)]
    assert [token for part in parts for token in part.tokens] == found.tokens
    assert [offset for part in parts for offset in part.text_offset] == found.text_offset


def test_logprobs_of_chats(client: openai.OpenAI) -> None:
    given = {"max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    choice = chat(client, **given).choices[0]
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content
    assert all(bytes(entry.bytes).decode() == entry.token for entry in entries)
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in entries)
    assert {len(entry.top_logprobs) for entry in entries} == {3}
    streamed = [c.choices[0].logprobs for c in chat(client, stream=True, **given)]
    assert [entry for part in streamed if part for entry in part.content] == entries


def test_parameters_without_effect(client: openai.OpenAI) -> None:
    given: Any = {
        "user": "me",
        "extra_body": {
            "safety_identifier": "me",
            "metadata": {"app": "x"},
            "store": False,
            "prompt_cache_key": "x",
            "prompt_cache_retention": "24h",
            "service_tier": "priority",
        },
    }
    how = {"max_tokens": 4, "temperature": 0}
    more = {
        "modalities": ["text"],
        "prediction": {"type": "content", "content": "Once"},
        "functions": None,
        "audio": None,
    }
    plain, with_all = chat(client, **how), {**given["extra_body"], **more}
    assert chat(client, **how, user="me", extra_body=with_all).choices == plain.choices
    plain = complete(client, **how, n=2)
    answer = complete(client, **how, **given, n=2, best_of=2, suffix="", echo=False)
    assert answer.choices == plain.choices


def test_our_own_parameters(client: openai.OpenAI, served: Served) -> None:
    greedy = complete(client, max_tokens=8, temperature=0)
    top = complete(client, max_tokens=8, extra_body={"top_k": 1, "keep_context": True})
    assert top.choices[0].text == greedy.choices[0].text
    stop = served.tokens(greedy.choices[0].text)[3]
    cut = complete(client, max_tokens=8, temperature=0, extra_body={"stop_token_ids": [stop]})
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("stop", 4)


@pytest.mark.parametrize(
    ("given", "param", "code"),
    [
        ({"tools": []}, "tools", "invalid_value"),
        ({"logit_bias": {"4096": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias", "invalid_value"),
        ({"extra_body": {"temprature": 1}}, "temprature", "unknown_parameter"),
        ({"store": True}, "store", "invalid_value"),
        ({"modalities": ["text", "audio"]}, "modalities", "invalid_value"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "invalid_value"),
        ({"verbosity": "low"}, "verbosity", "unknown_parameter"),
        ({"functions": [{"name": "f"}]}, "functions", "unknown_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format", "unknown_parameter"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": "many"}, "max_tokens", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}}, None, None),
    ],
)
def test_what_is_wrong_is_named(
    client: openai.OpenAI, given: Any, param: str | None, code: str | None
) -> None:
    error = refused(chat, client, **given)
    assert isinstance(error, openai.BadRequestError)
    assert error.type == "invalid_request_error"
    assert param is None or error.param == param
    assert code is None or error.code == code
    assert param is None or param in error.message or code is None


def test_prompts_that_are_too_long(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "a " * CONTEXT}]
    for error in (
        refused(chat, client, messages=messages),
        refused(complete, client, prompt="a " * CONTEXT, stream=True),
        refused(complete, client, prompt=[[5], [5] * CONTEXT]),
    ):
        assert (error.status_code, error.code) == (400, "context_length_exceeded")
        assert str(CONTEXT) in error.message


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [4096], [-1], [1.5], [[1], "a"], 3, None])
def test_prompts_that_are_none(client: openai.OpenAI, prompt: Any) -> None:
    error = refused(complete, client, prompt=prompt)
    assert (error.status_code, error.param) == (400, "prompt")


def test_other_models_and_echo(client: openai.OpenAI) -> None:
    error = refused(complete, client, model="gpt-5")
    assert isinstance(error, openai.NotFoundError)
    assert (error.code, error.param) == ("model_not_found", "model")
    assert refused(complete, client, echo=True).param == "echo"
    assert refused(complete, client, suffix="end").param == "suffix"
    assert "best_of" in refused(complete, client, best_of=3, n=2).message
    assert complete(client, echo=False, user="me", max_tokens=1).choices


def test_fifty_streams_at_once(client: openai.OpenAI, served: Served) -> None:
    alone = [
        complete(client, seed=seed, max_tokens=8 + seed % 3).choices[0].text for seed in range(5)
    ]

    def stream(number: int) -> str:
        seed = number % 5
        chunks = complete(client, seed=seed, max_tokens=8 + seed % 3, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(stream, range(50))) == alone * 10
    assert served.metric("headrace_running_sequences") == 0


def test_a_stream_that_is_closed_gives_its_pages_back(
    client: openai.OpenAI, served: Served
) -> None:
    used = 'headrace_kv_pages{state="used",tier="device"}'
    streams = [
        complete(client, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
        for _ in range(4)
    ]
    for stream in streams:
        next(stream)
    assert served.metric("headrace_running_sequences") == 4
    assert served.metric(used) >= 4
    for stream in streams:
        stream.close()
    wait_for(lambda: served.metric(used) == 0, 10.0, lambda: str(served.metric(used)))
    assert served.metric("headrace_running_sequences") == 0
