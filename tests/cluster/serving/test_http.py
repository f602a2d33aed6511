"""HTTP as it goes over the wire, before an engine that answers every prompt with itself."""

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from commands import wait_for
from prometheus_client.parser import text_string_to_metric_families
from served import MODEL, EchoEngine, Served, serving

from headrace.cluster.serving.http import send_events
from headrace.scheduler.errors import StageError

COMPLETIONS = "/v1/completions"
TEXT = "héllo 世界 😀 ok"


@pytest.fixture
def engine(tokenizer: Any) -> EchoEngine:
    return EchoEngine(tokenizer, max_context=4000)


@pytest.fixture
def served(engine: EchoEngine) -> Iterator[Served]:
    with serving(engine, max_body=4096, max_waiting=3, grace=1.0) as made:
        yield made
        engine.gate.set()


@pytest.fixture(scope="module")
def echoes(tokenizer: Any) -> Iterator[Served]:
    """For tests that leave the engine alone."""
    with serving(EchoEngine(tokenizer, max_context=4000), max_body=4096, max_waiting=3) as made:
        yield made


class Stream:
    """One streamed completion on a connection of its own."""

    def __init__(self, served: Served, prompt: str = TEXT, **given: Any) -> None:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 90, "stream": True, **given}
        raw = json.dumps(body).encode()
        self.socket = socket.create_connection(served.address, timeout=30)
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        self.socket.sendall(head.encode() + raw)

    def read(self) -> bytes:
        """All that comes until the server closes the connection."""
        data = b""
        while part := self.socket.recv(65536):
            data += part
        self.socket.close()
        return data

    def events(self) -> list[str]:
        return [event.strip() for event in dechunked(self.read()).split("\n\n") if event.strip()]


def dechunked(answer: bytes) -> str:
    _, _, rest = answer.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body.decode()


def completion(served: Served, **given: Any) -> tuple[int, Any, dict[str, str]]:
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 90, **given}
    return served.ask("POST", COMPLETIONS, body)


def test_server_sent_events(echoes: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(echoes.engine, "pace", 0.01)  # else what comes at once is sent at once
    events = Stream(echoes).events()
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == TEXT == completion(echoes)[1]["choices"][0]["text"]
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"


def test_what_may_become_a_stop_string_is_not_sent(echoes: Served) -> None:
    events = Stream(echoes, stop=["世界 😀 no", "ok"]).events()
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "héllo 世界 😀 "
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_stream_that_has_nothing_to_say_says_so() -> None:
    """Proxies close connections that are silent."""
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b"head"))

    async def events() -> AsyncGenerator[dict[str, Any], None]:
        yield {"n": 1}
        await asyncio.sleep(0.5)
        yield {"n": 2}

    asyncio.run(send_events(send, events(), idle=0.1))
    assert sent[:2] == [b"head", b'data: {"n":1}\n\n']
    assert sent[-3:] == [b'data: {"n":2}\n\n', b"data: [DONE]\n\n", b""]
    assert len(sent) > 6
    assert set(sent[2:-3]) == {b": still here\n\n"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/nothing", None, 404, "unknown_url"),
        ("GET", "/docs", None, 404, "unknown_url"),
        ("GET", COMPLETIONS, None, 405, "method_not_allowed"),
        ("POST", COMPLETIONS, b"{", 400, "invalid_value"),
        ("POST", COMPLETIONS, b"[1]", 400, "invalid_value"),
        ("POST", COMPLETIONS, b"[" * 3000, 400, "invalid_value"),
        ("POST", COMPLETIONS, b'{"prompt": "a", "seed": 1' + b"0" * 900 + b"}", 400, None),
        ("POST", COMPLETIONS, b'{"prompt": "\\ud800"}', 400, "invalid_value"),
        ("POST", COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', 400, "invalid_value"),
        ("POST", COMPLETIONS, b"\xff", 400, "invalid_value"),
        ("POST", COMPLETIONS, {"prompt": ["a"] * 4}, 400, "invalid_value"),
        ("POST", COMPLETIONS, {"prompt": "a", "stop": ["a"] * 17}, 400, "invalid_value"),
        ("POST", COMPLETIONS, {"prompt": "a", "stop": "a" * 257}, 400, "invalid_value"),
        ("POST", COMPLETIONS, {f"x{i}": 1 for i in range(65)}, 400, "invalid_value"),
        ("POST", COMPLETIONS, {"prompt": "a", "x" * 4000: 1}, 400, "unknown_parameter"),
        ("POST", COMPLETIONS, {"prompt": [[], *["a"] * 700]}, 400, "invalid_value"),
        ("POST", COMPLETIONS, b'{"prompt":[' + b"[]," * 1025 + b"[]]}", 400, "invalid_value"),
        ("POST", COMPLETIONS, b"x" * 4097, 413, "body_too_large"),
        ("POST", COMPLETIONS, b"x" * 1_000_000, 413, "body_too_large"),
        ("POST", "/tokenize", {"prompt": "a", "messages": []}, 400, None),
        ("POST", "/detokenize", {"tokens": [9999]}, 400, "invalid_value"),
        ("POST", "/v1/embeddings", {"input": "a"}, 404, "unknown_url"),
    ],
)
def test_errors_have_openais_shape(
    echoes: Served, method: str, path: str, body: Any, status: int, code: str | None
) -> None:
    found, answer, _ = echoes.ask(method, path, body)
    assert found == status, answer
    assert answer["error"].keys() == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert code is None or answer["error"]["code"] == code
    assert len(json.dumps(answer)) < 3000


def test_bodies_are_json_or_refused(echoes: Served) -> None:
    """What a form of another web page can send without a preflight."""
    body = json.dumps({"model": MODEL, "prompt": "a"}).encode()
    status, answer, _ = echoes.ask("POST", COMPLETIONS, body, {"Content-Type": "text/plain"})
    assert status == 415
    assert "application/json" in answer["error"]["message"]


def test_a_body_without_a_length_is_bounded_too(echoes: Served) -> None:
    with socket.create_connection(echoes.address, timeout=30) as made:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        made.sendall(f"{head}Content-Type: application/json\r\n".encode())
        made.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(6):
            made.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")
        made.sendall(b"0\r\n\r\n")
        assert made.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_tokens_and_back(echoes: Served) -> None:
    _, answer, _ = echoes.ask("POST", "/tokenize", {"model": MODEL, "prompt": TEXT})
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 4000
    _, back, _ = echoes.ask("POST", "/detokenize", {"tokens": answer["tokens"]})
    assert back == {"prompt": TEXT}
    told = {"messages": [{"role": "user", "content": "a"}]}
    chat = echoes.ask("POST", "/tokenize", told)[1]["tokens"]
    assert echoes.ask("POST", "/detokenize", {"tokens": chat})[1]["prompt"].endswith("assistant\n")


def test_prompts_are_not_logged(echoes: Served, caplog: pytest.LogCaptureFixture) -> None:
    secret = "zebra"
    with caplog.at_level(logging.DEBUG):
        assert completion(echoes, prompt=secret)[0] == 200
        assert completion(echoes, prompt=secret * 4000)[0] == 413
        assert completion(echoes, prompt=secret, temperature=secret)[0] == 400
        assert echoes.ask("POST", COMPLETIONS, f'"{secret}'.encode())[0] == 400
        assert Stream(echoes, prompt=secret).events()
    assert secret not in caplog.text


def test_a_full_queue_is_told_when_to_come_back(served: Served, engine: EchoEngine) -> None:
    assert completion(served, n=4)[0] == 400
    engine.gate.clear()
    streams = [Stream(served) for _ in range(3)]
    wait_for_prompts(served, 3)
    status, answer, headers = completion(served)
    assert status == 429
    assert answer["error"]["code"] == "queue_full"
    assert answer["error"]["type"] == "rate_limit_error"
    assert int(headers["retry-after"]) > 0
    engine.gate.set()
    assert all(stream.events()[-1] == "data: [DONE]" for stream in streams)
    assert completion(served)[0] == 200


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_is_forgotten(
    served: Served, engine: EchoEngine, streams: bool
) -> None:
    engine.gate.clear()
    stream = Stream(served, stream=streams, n=2)
    wait_for(lambda: len(engine.tenants) == 2, 10.0, lambda: "not begun")
    stream.socket.close()
    wait_for(
        lambda: (
            served.metric(f'headrace_requests_total{{path="{COMPLETIONS}",status="499"}}') == 1
            or streams
        ),
        10.0,
        lambda: "not noticed",
    )
    time.sleep(0.2)
    engine.gate.set()
    wait_for(lambda: engine.aborted == [1, 2], 10.0, lambda: str(engine.aborted))
    assert not engine.has_work
    assert completion(served)[0] == 200


def test_a_client_that_leaves_in_the_middle_of_its_request(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(served.address, timeout=30) as made:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
        made.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
    ended = f'headrace_requests_total{{path="{COMPLETIONS}",status="499"}}'
    wait_for(lambda: served.metric(ended) == 1, 10.0, lambda: "not noticed")
    assert not caplog.records


def test_a_client_that_does_not_read_holds_nobody_up(served: Served, engine: EchoEngine) -> None:
    long = "a" * 3000
    slow = Stream(served, prompt=long, max_tokens=3000, logprobs=0)
    fast = [completion(served)[1]["choices"][0]["text"] for _ in range(20)]
    assert fast == [TEXT] * 20
    wait_for(lambda: not engine.has_work, 20.0, lambda: "held up")
    assert slow.events()[-1] == "data: [DONE]"


def test_metrics(served: Served) -> None:
    completion(served)
    completion(served, bad=1)
    served.ask("GET", "/nowhere")
    text = served.ask("GET", "/metrics")[1]
    families = {family.name: family for family in text_string_to_metric_families(text)}
    requests = {
        (sample.labels["path"], sample.labels["status"]): sample.value
        for sample in families["headrace_requests"].samples
        if sample.name.endswith("_total")
    }
    assert requests == {(COMPLETIONS, "200"): 1, (COMPLETIONS, "400"): 1, ("other", "404"): 1}
    count = len(served.tokens(TEXT))
    assert served.metric("headrace_prompt_tokens_total") == count
    assert served.metric("headrace_output_tokens_total") == count
    assert served.metric("headrace_time_to_first_token_seconds_count") == 1
    assert served.metric("headrace_inter_token_seconds_count") == count - 1
    tiers = {sample.labels["tier"] for sample in families["headrace_kv_pages"].samples}
    assert tiers == {"device", "host", "nvme"}
    assert {"headrace_running_sequences", "headrace_waiting_sequences"} <= families.keys()
    guessed = {"headrace_decodes", "headrace_draft_tokens", "headrace_accepted_draft_tokens"}
    assert guessed <= families.keys()


def test_health(echoes: Served) -> None:
    assert echoes.ask("GET", "/health/live")[:2] == (200, {"status": "live"})
    assert echoes.ask("GET", "/health/ready")[:2] == (200, {"status": "ready"})


def test_only_local_names_lead_to_a_local_server(echoes: Served) -> None:
    """A page elsewhere can have its own name point to this machine."""
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::1"):
        assert echoes.ask("GET", "/v1/models", headers={"Host": host})[0] == 403
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000"):
        assert echoes.ask("GET", "/v1/models", headers={"Host": host})[0] == 200


def test_a_stop_lets_answers_finish(served: Served, engine: EchoEngine) -> None:
    engine.gate.clear()
    stream = Stream(served)
    wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
    served.stop()
    wait_for(lambda: not reachable(served), 10.0, lambda: "still listening")
    engine.gate.set()
    assert stream.events()[-1] == "data: [DONE]"


def test_a_stop_ends_when_the_grace_is_over(served: Served, engine: EchoEngine) -> None:
    stream = Stream(served, prompt="a" * 3500, max_tokens=3500)
    wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
    engine.pace = 0.01
    began = time.monotonic()
    served.stop()
    last = json.loads(stream.events()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "server_stopping"
    assert 0.5 < time.monotonic() - began < 8.0


def test_a_second_stop_does_not_wait(engine: EchoEngine) -> None:
    engine.pace = 0.01
    with serving(engine, grace=60.0) as served:
        stream = Stream(served, prompt="a" * 90)
        wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
        engine.pace = 1.0
        served.stop()
        served.stop()
        assert "server_stopping" in stream.events()[-1]


def test_an_engine_that_fails_ends_the_server(engine: EchoEngine) -> None:
    engine.gate.clear()
    with pytest.raises(StageError, match="stage 1 died"), serving(engine) as served:
        stream, whole = Stream(served), Stream(served, stream=False)
        wait_for_prompts(served, 2)
        engine.failure = StageError("stage 1 died")
        engine.gate.set()
        assert '"code":"engine_failed"' in stream.events()[-1]
        answer = whole.read()
        assert answer.startswith(b"HTTP/1.1 500 ")
        assert b"stage 1" not in answer
        wait_for(lambda: not reachable(served), 10.0, lambda: "still listening")


def wait_for_prompts(served: Served, count: int) -> None:
    """Until so many prompts of TEXT were admitted, whatever the engine does."""
    tokens = count * len(served.tokens(TEXT))
    name = "headrace_prompt_tokens_total"
    wait_for(lambda: served.metric(name) == tokens, 10.0, lambda: str(served.metric(name)))


def reachable(served: Served) -> bool:
    try:
        socket.create_connection(served.address, timeout=1.0).close()
    except OSError:
        return False
    return True
