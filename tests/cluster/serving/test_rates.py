"""How many requests and tokens a minute a key may have: the rule on a clock moved by hand, and the server's answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from commands import wait_for
from served import MODEL, EchoEngine, Served, serving
from typer.testing import CliRunner

from headrace.client import Client, OverloadedError
from headrace.cluster.cli.main import app
from headrace.cluster.serving.errors import ApiError
from headrace.cluster.serving.keys import ApiKey, add_key, load_keys
from headrace.cluster.serving.rates import Rates


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def rates_of(clock: Clock, requests: int | None, tokens: int | None) -> Rates:
    keys = [ApiKey("ann", b"", None, 1, requests, tokens), ApiKey("bob", b"")]
    return Rates(keys, clock)


def seconds_until(refused: Any, *given: Any) -> int | None:
    """What a refusal says, None when there is none."""
    try:
        refused(*given)
    except ApiError as error:
        assert (error.status, error.code) == (429, "rate_limit_exceeded")
        return error.retry_after
    return None


def test_requests_come_back_evenly() -> None:
    clock = Clock()
    rates = rates_of(clock, 6, None)
    assert [seconds_until(rates.take_request, "ann") for _ in range(8)] == [None] * 6 + [10] * 2
    clock.now += 9.9
    assert seconds_until(rates.take_request, "ann") == 1
    clock.now += 0.1
    assert [seconds_until(rates.take_request, "ann") for _ in range(2)] == [None, 10]
    clock.now += 3600  # no more than a minute's is saved up
    assert [seconds_until(rates.take_request, "ann") for _ in range(7)] == [None] * 6 + [10]
    assert {seconds_until(rates.take_request, "bob") for _ in range(100)} == {None}


def test_a_refusal_says_when_it_is_worth_to_come_back() -> None:
    """To the second, at any rate and time."""
    for per_minute in (1, 7, 59, 60, 61, 999_999):
        clock = Clock()
        rates = rates_of(clock, None, per_minute)
        rates.take_prompt("ann", per_minute)
        rates.take_output("ann", 3 * per_minute + 1)
        clock.now += 1 / 3
        wait = seconds_until(rates.take_prompt, "ann", per_minute)
        assert wait is not None
        clock.now += wait
        assert seconds_until(rates.take_prompt, "ann", per_minute) is None


def test_prompts_are_taken_at_once_and_answers_as_they_come() -> None:
    clock = Clock()
    rates = rates_of(clock, None, 600)
    assert seconds_until(rates.take_prompt, "ann", 500) is None
    assert seconds_until(rates.take_prompt, "ann", 101) == 1
    assert seconds_until(rates.take_prompt, "ann", 100) is None
    rates.take_output(
        "ann", 50
    )  # below zero: that answer goes on, and the next prompt waits for it
    assert rates.headers("ann")["x-ratelimit-remaining-tokens"] == "0"
    assert seconds_until(rates.take_prompt, "ann", 10) == 6
    clock.now += 6
    assert seconds_until(rates.take_prompt, "ann", 10) is None
    # What is longer than a minute's needs all of that.
    assert seconds_until(rates.take_prompt, "ann", 5000) == 60
    clock.now += 60
    assert seconds_until(rates.take_prompt, "ann", 5000) is None
    assert seconds_until(rates.take_prompt, "ann", 600) == 500


def test_headers() -> None:
    clock = Clock()
    rates = rates_of(clock, 100, 600)
    rates.take_request("ann")
    rates.take_prompt("ann", 450)
    rates.take_output("ann", 3450)
    assert rates.headers("ann") == {
        "x-ratelimit-limit-requests": "100",
        "x-ratelimit-remaining-requests": "99",
        "x-ratelimit-reset-requests": "600ms",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "6m30s",
    }
    clock.now += 384.25
    assert rates.headers("ann")["x-ratelimit-reset-tokens"] == "5.75s"
    assert rates.headers("ann")["x-ratelimit-remaining-tokens"] == "542"
    assert rates.headers("bob") == {}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_key_files(keys: Path) -> None:
    """A file that was made before there were such limits, and what is added to it."""
    old = "".join(
        f"{name}:{'ab' * 32}{more}\n" for name, more in (("a", ""), ("b", ":4"), ("c", "::3"))
    )
    keys.write_text(old)
    keys.chmod(0o600)
    arguments = ["serve-key", "d", "--file", str(keys), "--requests-per-minute", "60"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    add_key(keys, "e", 2, 5, requests_per_minute=7, tokens_per_minute=999_999_999)
    assert keys.read_text().startswith(old)
    found = {
        key.name: (key.limit, key.weight, key.requests_per_minute, key.tokens_per_minute)
        for key in load_keys(keys)
    }
    assert found == {
        "a": (None, 1, None, None),
        "b": (4, 1, None, None),
        "c": (None, 3, None, None),
        "d": (None, 1, 60, None),
        "e": (2, 5, 7, 999_999_999),
    }


@pytest.fixture
def secrets(keys: Path) -> dict[str, str]:
    return {
        "few": add_key(keys, "few", None, requests_per_minute=3),
        "short": add_key(keys, "short", None, tokens_per_minute=12),
        "free": add_key(keys, "free", None),
    }


@pytest.fixture
def served(tokenizer: Any, keys: Path, secrets: dict[str, str], tmp_path: Path) -> Iterator[Served]:
    engine = EchoEngine(tokenizer)
    with serving(engine, api_keys=keys, grpc_port=0, files=tmp_path / "files") as made:
        yield made


def client_of(served: Served, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


def turned_away(served: Served, key: str) -> float:
    text = served.ask("GET", "/metrics", headers={"Authorization": f"Bearer {key}"})[1]
    name = 'headrace_turned_away_total{code="rate_limit_exceeded"} '
    return sum(
        float(line.removeprefix(name)) for line in text.splitlines() if line.startswith(name)
    )


def test_requests_a_minute(served: Served, secrets: dict[str, str]) -> None:
    """Over HTTP and gRPC together, and none of batches."""
    few, asked = secrets["few"], {"model": MODEL, "prompt": "a b c", "max_tokens": 2}
    with client_of(served, few) as client, Client(str(served.grpc), api_key=few) as rpc:
        begun = client.completions.with_raw_response.create(**asked)
        assert begun.headers["x-ratelimit-limit-requests"] == "3"
        assert begun.headers["x-ratelimit-remaining-requests"] == "2"
        assert begun.headers["x-ratelimit-reset-requests"].endswith("s")
        assert "x-ratelimit-limit-tokens" not in begun.headers
        assert rpc.generate("a b c", max_tokens=2).whole().text == "a b"
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**asked, top_p=3.0)  # counts: it was read
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(**asked, stream=True)
        error: Any = refused.value
        assert error.code == "rate_limit_exceeded"
        assert 0 < int(error.response.headers["retry-after"]) <= 20
        assert error.response.headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(OverloadedError, match="3 requests a minute: 0 are left") as overloaded:
            rpc.generate("a").whole()
        assert overloaded.value.reason == "rate_limit_exceeded"
        assert 0 < (overloaded.value.retry_after or 0) <= 20
        rpc.loads()
        line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": asked}
        file = client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
        made = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        wait_for(
            lambda: client.batches.retrieve(made.id).status == "completed", 20.0, lambda: "not done"
        )
    assert turned_away(served, few) == 2
    with client_of(served, secrets["free"]) as client:
        assert all(client.completions.create(**asked) for _ in range(5))


def test_tokens_a_minute(served: Served, secrets: dict[str, str]) -> None:
    short = secrets["short"]
    count = len(served.engine.tokenizer("a b c")["input_ids"])
    assert count <= 4
    with client_of(served, short) as client, Client(str(served.grpc), api_key=short) as rpc:
        answer = client.completions.with_raw_response.create(
            model=MODEL, prompt="a b c", max_tokens=2, n=2
        )
        usage = answer.parse().usage
        assert usage is not None and usage.total_tokens == count + 4
        assert answer.headers["x-ratelimit-limit-tokens"] == "12"
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) == 12 - usage.total_tokens
        with pytest.raises(openai.RateLimitError, match="12 tokens a minute"):
            client.completions.create(model=MODEL, prompt="a b c " * 8)
        with pytest.raises(OverloadedError, match="12 tokens a minute"):
            rpc.generate("a b c " * 8).whole()
    assert turned_away(served, short) == 2
