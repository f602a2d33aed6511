"""Clients of gRPC, in Python and on the command line, against the bundled model: what HTTP answers, too."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import MODEL, EchoEngine, Served, serving, stories_engine
from typer.testing import CliRunner

import headrace
from headrace.client import (
    AbortedError,
    Answer,
    AsyncClient,
    AuthenticationError,
    Client,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RequestExistsError,
    UnavailableError,
)
from headrace.cluster.cli.main import app, main
from headrace.cluster.serving.keys import add_key
from headrace.scheduler.errors import HeadraceError, RequestError

PROMPT = "Once upon a time"
TALK = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Tell a story."}]
SCHEMA = {
    "type": "object",
    "properties": {"z": {"type": "boolean"}, "a": {"enum": ["x", "y"]}},
    "required": ["z", "a"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Rome", "Oslo"]}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def served(stories: Path) -> Iterator[Served]:
    with stories_engine(stories) as engine, serving(engine, grpc_port=0) as made:
        yield made


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Client]:
    with Client(str(served.grpc)) as made:
        yield made


def over_http(served: Served, path: str, **given: Any) -> Any:
    status, answer, _ = served.ask("POST", path, {"model": MODEL, **given})
    assert status == 200, answer
    return answer


@pytest.mark.parametrize(
    "given",
    [
        {"seed": 5, "max_tokens": 12},
        {"seed": 6, "max_tokens": 8, "n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 50},
        {"seed": 7, "max_tokens": 8, "logprobs": 2, "repetition_penalty": 1.1},
        {"temperature": 0.0, "max_tokens": 12, "stop": [" was"], "logit_bias": {"300": -100.0}},
        {"seed": 8, "max_tokens": 60, "structured_outputs": {"json": SCHEMA}},
        {"seed": 8, "max_tokens": 60, "structured_outputs": {"choice": ["yes", "no"]}},
    ],
)
def test_a_completion_is_that_of_http(served: Served, client: Client, given: Any) -> None:
    want = over_http(served, "/v1/completions", prompt=PROMPT, **given)
    answer = client.generate(PROMPT, **given).whole()
    check(answer, want, "text")
    for output, choice in zip(answer.outputs, want["choices"], strict=True):
        if "logprobs" in given:
            listed = choice["logprobs"]
            assert [each.token for each in output.logprobs] == listed["tokens"]
            assert [each.logprob for each in output.logprobs] == listed["token_logprobs"]
            assert all(len(each.top) == 2 for each in output.logprobs)
    if given.get("structured_outputs", {}).get("json"):
        assert list(json.loads(answer.text)) == ["z", "a"]


def test_tokens_are_a_prompt(served: Served, client: Client) -> None:
    given: Any = {"seed": 5, "max_tokens": 4}
    want = over_http(served, "/v1/completions", prompt=PROMPT, **given)
    check(client.generate(served.tokens(PROMPT), **given).whole(), want, "text")


def check(answer: Answer, want: Any, where: str) -> None:
    told = [
        choice["text"] if where == "text" else choice["message"]["content"] or ""
        for choice in want["choices"]
    ]
    assert [output.text for output in answer.outputs] == told
    reasons = [choice["finish_reason"] for choice in want["choices"]]
    assert [output.finish_reason for output in answer.outputs] == reasons
    assert answer.usage is not None
    assert answer.usage.completion_tokens == want["usage"]["completion_tokens"]
    assert answer.usage.prompt_tokens == want["usage"]["prompt_tokens"]


def test_a_chat_is_that_of_http(served: Served, client: Client) -> None:
    given = {"seed": 3, "max_tokens": 12}
    want = over_http(served, "/v1/chat/completions", messages=TALK, **given)
    check(client.generate(TALK, **given).whole(), want, "message")
    with pytest.raises(InvalidRequestError, match="may not set") as caught:
        client.generate(TALK, chat_template_kwargs={"tokenize": False}).whole()
    assert caught.value.param == "chat_template_kwargs"


def test_calls_of_tools_are_those_of_http(stories: Path) -> None:
    with stories_engine(stories) as engine:
        engine.tokenizer.chat_template += "{# tools #}{% if tools %}{{ tools | tojson }}{% endif %}"
        with serving(engine, grpc_port=0) as served, Client(str(served.grpc)) as client:
            given: Any = {
                "seed": 4,
                "max_tokens": 100,
                "tools": [WEATHER],
                "tool_choice": {"type": "function", "function": {"name": "weather"}},
            }
            want = over_http(served, "/v1/chat/completions", messages=TALK, **given)
            answer = client.generate(TALK, **given).whole()
            check(answer, want, "message")
            (listed,) = want["choices"][0]["message"]["tool_calls"]
            (call,) = answer.outputs[0].tool_calls
            assert (call.name, call.arguments) == (
                listed["function"]["name"],
                listed["function"]["arguments"],
            )
            assert answer.outputs[0].finish_reason == "tool_calls"
            # And back to the model.
            said = {"role": "assistant", "content": None, "tool_calls": [listed]}
            found = {"role": "tool", "content": "Sun.", "tool_call_id": listed["id"]}
            talk = [*TALK, said, found]
            want = over_http(served, "/v1/chat/completions", messages=talk, seed=1, max_tokens=4)
            check(client.generate(talk, seed=1, max_tokens=4).whole(), want, "message")


def test_pieces(client: Client) -> None:
    with client.generate(PROMPT, seed=5, max_tokens=12) as stream:
        assert stream.usage is None
        pieces = list(stream)
        assert stream.usage is not None and stream.usage.completion_tokens == 12
    assert len(pieces) > 5 and pieces[-1].finish_reason == "length"


def test_asyncio(served: Served, client: Client) -> None:
    want = client.generate(PROMPT, seed=5, max_tokens=12).whole()

    async def ask() -> None:
        async with AsyncClient(str(served.grpc)) as other:
            text = ""
            async with other.generate(PROMPT, seed=5, max_tokens=12) as stream:
                async for piece in stream:
                    text += piece.text
            assert text == want.text
            calls = [other.generate(PROMPT, seed=5, max_tokens=12).whole() for _ in range(3)]
            assert {each.text for each in await asyncio.gather(*calls)} == {want.text}
            assert (await other.model_info()) == client.model_info()
            assert (await other.server_info()).is_ready
            assert (await other.loads()).open_requests == 0
            assert not await other.abort("nothing")
            with pytest.raises(InvalidRequestError):
                await other.generate(PROMPT, temperature=-1).whole()
            with pytest.raises(RequestError, match="temprature: there is no such parameter"):
                other.generate(PROMPT, temprature=1)

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("prompt", "given", "why"),
    [
        (PROMPT, {"temprature": 1}, "temprature: there is no such parameter"),
        (PROMPT, {"max_tokens": "ten"}, "max_tokens"),
        (PROMPT, {"max_tokens": 2**40}, "max_tokens"),
        (PROMPT, {"priority": "urgent"}, "priority"),
        (PROMPT, {"structured_outputs": {"regex": "a", "grammar": "b"}}, "give one of"),
        ([1, "a"], {}, "prompt"),
        ([{"role": 1}], {}, "prompt"),
    ],
)
def test_what_cannot_be_sent(client: Client, prompt: Any, given: Any, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        client.generate(prompt, **given)


def test_errors_have_types(tokenizer: Any, tmp_path: Path) -> None:
    secret = add_key(tmp_path / "keys", "ann", 2)
    engine = EchoEngine(tokenizer)
    with (
        serving(engine, grpc_port=0, api_keys=tmp_path / "keys") as served,
        Client(str(served.grpc)) as stranger,
        Client(str(served.grpc), api_key=secret) as client,
    ):
        with pytest.raises(AuthenticationError, match="give an API key"):
            stranger.model_info()
        with pytest.raises(NotFoundError):
            client.generate("a", model="b").whole()
        with pytest.raises(InvalidRequestError) as wrong:
            client.generate("a", top_p=3.0).whole()
        assert (wrong.value.param, wrong.value.reason) == ("top_p", "invalid_value")
        with pytest.raises(InvalidRequestError, match="larger than max"):
            client.generate("a" * 5_000_000).whole()
        engine.gate.clear()
        with pytest.raises(DeadlineError):
            client.generate("a b", timeout=0.1).whole()
        with pytest.raises(DeadlineError, match="the time for the answer is over"):
            client.generate("a b", deadline_ms=100).whole()
        running = client.generate("a b", request_id="one")
        while not client.loads().open_requests:
            pass
        with pytest.raises(RequestExistsError):
            client.generate("a b", request_id="one").whole()
        more = client.generate("a b")
        while client.loads().open_requests < 2:
            pass
        with pytest.raises(OverloadedError) as full:
            client.generate("a b").whole()
        assert full.value.retry_after == 2.0
        assert client.abort("one")
        with pytest.raises(AbortedError, match="aborted by its request_id"):
            running.whole()
        engine.gate.set()
        assert more.whole().text == "a b"
    with (
        Client(str(served.grpc)) as gone,
        pytest.raises(UnavailableError, match=str(served.grpc)),
    ):
        gone.model_info()


def test_the_command_line(
    served: Served, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--address", str(served.grpc)]

    def run(*arguments: str) -> str:
        found = CliRunner().invoke(app, ["client", *arguments, *at], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return found.stdout

    want = client.generate(PROMPT, seed=5, max_tokens=12).whole()
    arguments = ("generate", PROMPT, "--seed", "5", "--max-tokens", "12")
    assert run(*arguments) == want.text + "\n"
    lines = [json.loads(line) for line in run(*arguments, "--json").splitlines()]
    assert "".join(line.get("text", "") for line in lines) == want.text
    assert lines[-1]["usage"]["completion_tokens"] == 12
    talk = client.generate([{"role": "user", "content": "Hi"}], seed=1, max_tokens=4).whole()
    chat = ("generate", "Hi", "--chat", "--seed", "1", "--max-tokens", "4", "--priority", "batch")
    assert run(*chat) == talk.text + "\n"
    assert "max model len      1024" in run("info")
    assert json.loads(run("loads", "--json"))["running_sequences"] == 0
    assert "device pages" in run("loads")
    file = tmp_path / "key"
    file.write_text("hr-any\n")
    for mode, arguments, why in (
        (0o600, ("abort", "one", *at), "no request 'one' of this key is running"),
        (0o600, ("generate", "a", "--top-p", "9", *at), "top_p must be above 0"),
        (0o600, ("info", "--address", "127.0.0.1:1"), "127.0.0.1:1: "),
        (0o644, ("info", *at), "mode 0644"),
    ):
        file.chmod(mode)
        with pytest.raises(SystemExit) as ended:
            main(["client", *arguments, "--key-file", str(file)])
        assert ended.value.code == 1 and why in capsys.readouterr().err


def test_nothing_is_loaded_before_it_is_needed() -> None:
    code = "import sys, headrace.cluster.cli.main; print('grpc' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "False\n"
    assert headrace.client.Client is Client


def test_a_certificate_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match=r"cannot read .*: No such file"):
        Client("127.0.0.1:1", ca_file=tmp_path / "missing.pem")
