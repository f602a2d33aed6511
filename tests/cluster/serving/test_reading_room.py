"""Requests that are long, many at once: what they hold, and that short ones do not wait for them."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from commands import STORIES, wait_for
from served import EchoEngine, Served, serving

from headrace.cluster.tokenizer import load_tokenizer

STORY = "One day, Tom and his dog went to the lake. It was cold, and they had no boat.\n"
MAX_BODY = 256 << 10


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    engine = EchoEngine(load_tokenizer(STORIES))
    engine.gate.set()
    with serving(engine, max_body=MAX_BODY) as made:
        yield made


def test_short_requests_do_not_wait_for_long_ones(served: Served) -> None:
    parts = range(MAX_BODY // 100)
    texts = ["".join(f"{text} {i}: {STORY}" for i in parts) for text in range(6)]
    with ThreadPoolExecutor(6) as threads:
        asked = [
            threads.submit(served.ask, "POST", "/tokenize", {"prompt": text}) for text in texts
        ]
        waits = []
        while not all(each.done() for each in asked):
            start = time.perf_counter()
            assert served.ask("POST", "/tokenize", {"prompt": "hello"})[0] == 200
            waits.append(time.perf_counter() - start)
    assert all(each.result()[1]["count"] > 60_000 for each in asked)
    assert len(waits) > 3


def test_bodies_have_room_for_so_many_bytes_and_no_more(served: Served) -> None:
    """Those that are not complete count: the server waits for their ends."""
    head = (
        "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {MAX_BODY}\r\n\r\n"
    ).encode()
    begun = json.dumps({"prompt": "a" * (MAX_BODY - 100)}).encode()
    held = []
    try:
        waits, status = {"prompt": STORY * 2000}, 200
        while status == 200 and len(held) < 200:  # 32 have room, less those that are asked
            held.append(socket.create_connection(served.address))
            held[-1].sendall(head + begun)
            status, body, headers = served.ask("POST", "/tokenize", waits)
        assert (status, body["error"]["code"], headers["retry-after"]) == (
            429,
            "too_many_bytes",
            "2",
        )
        assert served.ask("POST", "/tokenize", {"prompt": "hello"})[0] == 200
    finally:
        for each in held:
            each.close()
    wait_for(
        lambda: served.ask("POST", "/tokenize", waits)[0] == 200,
        30,
        lambda: "the room was not given back",
    )


def test_a_prompt_that_is_too_long_is_refused_at_once(served: Served) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": STORY * 2000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": STORY * 2000}]}),
    ):
        start = time.perf_counter()
        status, told, _ = served.ask("POST", path, body)
        assert (status, told["error"]["code"]) == (400, "context_length_exceeded")
        assert "more than 100 tokens" in told["error"]["message"]
        assert time.perf_counter() - start < 1
