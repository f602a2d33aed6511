"""Input that nobody means well with: all of it is refused, and nothing stays behind."""

import gc
import http.client
import json
import random
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hostile
import psutil
import pytest
from certificates import make_certificate
from commands import wait_for
from served import MODEL, EchoEngine, Served, serving, stories_engine

from headrace.cluster.json_text import MAX_CONTAINERS, MAX_DEPTH, read_json
from headrace.cluster.serving.keys import add_key
from headrace.cluster.serving.server import Listener, ServerOptions
from headrace.scheduler.errors import HeadraceError

HEAD = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def served(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    files = tmp_path_factory.mktemp("files") / "files"
    with stories_engine(stories) as engine, serving(engine, files=files, grpc_port=0) as made:
        yield made


@pytest.fixture
def few(tokenizer: Any) -> Iterator[Served]:
    with serving(EchoEngine(tokenizer), max_connections=4) as made:
        yield made


def test_mutated_bodies(served: Served) -> None:
    came = hostile.requests(served.address, seed=0, count=250, limit=30.0)
    assert {200, 400, 404, 405, 415} <= came.keys()
    assert served.ask("POST", "/tokenize", {"prompt": "a"})[0] == 200
    assert not served.engine.has_work


def test_mutated_messages_and_frames(served: Served) -> None:
    came = hostile.messages(served.grpc or "", seed=0, count=150)
    assert {"OK", "INVALID_ARGUMENT"} <= came.keys()
    draw, damaged = random.Random(0), hostile.heads(random.Random(0))
    host, port = (served.grpc or "").split(":")
    for _ in range(20):
        hostile.throw((host, int(port)), hostile.frames(draw))
        hostile.throw(served.address, hostile.frames(draw))
        hostile.throw(served.address, next(damaged))
    assert hostile.messages(served.grpc or "", seed=1, count=5)
    assert served.ask("GET", "/health/ready")[0] == 200


def test_a_bomb_is_not_unpacked(served: Served) -> None:
    before = psutil.Process().memory_info().rss
    zipped = {"Content-Encoding": "gzip"}
    assert served.ask("POST", "/v1/completions", hostile.bomb(), zipped)[0] == 400
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 50 << 20


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * (4 << 20), "more than"),
        ("[" + "[]," * 1_300_000 + "[]]", f"more than {MAX_CONTAINERS}"),
        ('{"a":' * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "deep in each other"),
        ('["\\"[",' * 200 + "1" + "]" * 200, "deep in each other"),
        ("]" * (4 << 20), "Expecting value"),
        ("9" * 5000, "4300"),
    ],
)
def test_json_that_is_too_much(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_json(text)


def test_brackets_in_texts_are_texts() -> None:
    text = "[" * 200_000 + '\\"{[' * 1000
    assert read_json(json.dumps({"a": text}).encode()) == {"a": text}
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(read_json(deep)) == deep


def closed(client: socket.socket) -> bool:
    client.settimeout(0.01)
    try:
        return client.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_who_waits_longest_makes_room(few: Served) -> None:
    idle = [socket.create_connection(few.address) for _ in range(4)]
    for client in idle:
        client.sendall(HEAD)
    assert few.ask("GET", "/health/live")[0] == 200
    wait_for(lambda: closed(idle[0]), 5.0, lambda: "the first one stays")
    assert not any(map(closed, idle[1:]))
    for client in idle:
        client.close()


def test_handshakes_that_do_not_come_make_room(tokenizer: Any, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    made = EchoEngine(tokenizer)
    with (
        serving(made, max_connections=4, tls_cert=cert, tls_key=key) as served,
        ExitStack() as stack,
    ):
        idle = [stack.enter_context(socket.create_connection(served.address)) for _ in range(9)]
        trusted = ssl.create_default_context(cafile=cert)
        asked = http.client.HTTPSConnection(*served.address, timeout=30, context=trusted)
        asked.request("GET", "/health/live")
        assert asked.getresponse().status == 200
        asked.close()
        assert sum(map(closed, idle)) == 6


def test_requests_under_way_are_not_cut_off_for_others(few: Served) -> None:
    body = b'{"prompt": "a"}'
    working = [socket.create_connection(few.address) for _ in range(4)]
    for client in working:
        client.sendall(HEAD + b"Content-Type: application/json\r\nContent-Length: 15\r\n")
        client.sendall(b"Expect: 100-continue\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 100")
    with socket.create_connection(few.address) as fifth:
        wait_for(lambda: closed(fifth), 5.0, lambda: "a fifth came in")
    for client in working:
        client.sendall(body)
        client.settimeout(10.0)
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        client.close()
    wait_for(lambda: few.ask("GET", "/health/live")[0] == 200, 5.0, lambda: "no room again")


def test_more_connections_than_files(tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match=r"--max-connections 999999999 needs .* open files"):
        Listener(ServerOptions(MODEL, port=0, max_connections=999_999_999)).close()


def test_the_description_is_there_without_a_key(tokenizer: Any, tmp_path: Path) -> None:
    add_key(tmp_path / "keys", "ann", None)
    made = EchoEngine(tokenizer)
    with serving(made, api_keys=tmp_path / "keys", files=tmp_path / "files") as served:
        status, told, _ = served.ask("GET", "/openapi.json")
        assert status == 200
        chat = told["paths"]["/v1/chat/completions"]["post"]
        assert chat["security"] == [{"key": []}]
        assert {"400", "401", "413", "415", "429", "503", "504"} <= chat["responses"].keys()
        name = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
        shape = told["components"]["schemas"][name]
        assert {"messages", "tools", "deadline_ms"} <= shape["properties"].keys()
        assert shape["additionalProperties"] is False
        assert "security" not in told["paths"]["/health/live"]["get"]
        assert "/v1/files/{file_id}/content" in told["paths"]
    with serving(made) as served:
        _, told, _ = served.ask("GET", "/openapi.json")
        assert "/v1/files" not in told["paths"]
        assert "securitySchemes" not in told["components"]
