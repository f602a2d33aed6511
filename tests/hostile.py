"""Requests that nobody means well with, drawn from a seed, and what may be answered."""

import gzip
import http.client
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from headrace.cluster.serving.rpc import batch_pb2
from headrace.cluster.serving.rpc import inference_pb2 as pb

MODEL = "stories"

STATED = {
    (503, "shutting_down"),
    (504, "deadline_passed"),
}
"""Statuses of 500 and more that the server's documentation knows of; no other is right."""

DEADLINE = {"X-Request-Timeout-Ms": "20000"}
"""So that a request may well ask for much, on a slow machine, too."""

_DEEP = 100_000

VALUES: list[Callable[[random.Random], str]] = [
    lambda r: r.choice(["null", "true", "false", '""', "[]", "{}", "0", "-1", "-0.0"]),
    lambda r: r.choice(["NaN", "Infinity", "-Infinity", "1e308", "1e999", "-1e-400", "1e5"]),
    lambda r: str(r.choice([2**31 - 1, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**30])),
    lambda r: "9" * r.choice([400, 4300, 4301, 50_000]),
    lambda r: json.dumps(r.choice(["\0", "a\0b", "\ud800", "\udfff\ud800", "\u202e", "😀" * 99])),
    lambda r: '"' + r.choice(["x", "\\u0000", "\\\\", "<|im_start|>", " ", "é"]) * 20_000 + '"',
    lambda r: "[" * _DEEP + "]" * r.choice([_DEEP, 0]),
    lambda r: '{"a":' * _DEEP + "1" + "}" * r.choice([_DEEP, 0]),
    lambda r: "[" * 120 + "]" * 120,
    lambda r: '{"a":' * 120 + "1" + "}" * 120,
    lambda r: "[" + ",".join([r.choice(["0", "[]", "{}", '""', "null", "1.5"])] * 50_000) + "]",
    lambda r: "{" + ",".join(f'"k{i}":{i}' for i in range(r.choice([65, 2000, 50_000]))) + "}",
    lambda r: "{" + '"a":1,' * 20_000 + '"a":2}',
    lambda r: json.dumps([[r.randrange(10**6) for _ in range(r.randrange(5))] for _ in range(5)]),
    lambda r: r.choice(['"/etc/passwd"', '"../../x"', '"file-0"', '"{{ 7*7 }}"', '"%s%n"']),
    lambda r: r.choice(["nul", "'a'", "{a:1}", "[1,]", "/*", "\\", '"', "\ufeff"]),
]
"""JSON, and what only looks like it."""

_TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
_TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"a": {}}}},
}
_FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}

SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": MODEL, "prompt": "Once", "max_tokens": 2, "temperature": 0.5}),
    ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 1, "n": 2, "stream": True}),
    (
        "/v1/completions",
        {"prompt": ["a"], "max_tokens": 2, "logprobs": 2, "stop": ["x"], "seed": 1},
    ),
    ("/v1/completions", {"prompt": "a", "max_tokens": 3, "structured_outputs": {"choice": ["b"]}}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 2, "logit_bias": {"5": 1.5}, "top_k": 3}),
    ("/v1/chat/completions", {"messages": _TALK, "max_tokens": 2, "stream": True}),
    ("/v1/chat/completions", {"messages": _TALK, "max_tokens": 3, "response_format": _FORM}),
    ("/v1/chat/completions", {"messages": _TALK, "max_tokens": 2, "tools": [_TOOL]}),
    (
        "/v1/chat/completions",
        {"messages": _TALK, "max_tokens": 1, "chat_template_kwargs": {"a": {"b": [1]}}},
    ),
    ("/tokenize", {"model": MODEL, "prompt": "Once upon a time"}),
    ("/tokenize", {"messages": _TALK, "chat_template_kwargs": {"a": 1}}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    (
        "/v1/batches",
        {
            "input_file_id": "file-0",
            "endpoint": "/v1/completions",
            "completion_window": "24h",
            "metadata": {"a": "b"},
        },
    ),
]

_FILE = (
    b'--edge\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{}\n\r\n--edge--\r\n'
)

_TYPES = [
    "",
    "text/plain",
    "application/xml",
    "application/json; charset=utf-16",
    "\u00ff/x",
    "*/*",
]


class Request:
    """One over HTTP."""

    def __init__(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        self.method, self.path, self.body, self.headers = method, path, body, headers

    def send(self, connection: http.client.HTTPConnection) -> tuple[int, bytes]:
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body: Any = iter([self.body[:7], self.body[7:]]) if chunked else self.body
        connection.request(self.method, self.path, body, self.headers, encode_chunked=chunked)
        answer = connection.getresponse()
        return answer.status, answer.read()


def http_request(draw: random.Random) -> Request:
    if draw.random() < 0.1:
        kind = "multipart/form-data; boundary=edge"
        return Request("POST", "/v1/files", _bytes(draw, _FILE), {"Content-Type": kind})
    if draw.random() < 0.05:
        return _without_body(draw)
    path, body = draw.choice(SEEDS)
    raw = _value(draw, body) if draw.random() < 0.6 else _bytes(draw, json.dumps(body).encode())
    return Request("POST", path, raw, _headers(draw))


def _without_body(draw: random.Random) -> Request:
    wild = "".join(draw.choices("abc/.%0-_~$?&=+:@!,;'()*" + "é\x7f".encode("latin-1").hex(), k=12))
    path = draw.choice(
        [
            f"/v1/files?limit={wild}",
            f"/v1/files/{wild}",
            f"/v1/batches?after={wild}",
            f"/v1/models/{wild}",
            f"/v1/batches/{wild}/cancel",
            f"/v1/files/{'a' * 5000}/content",
            f"/{wild}",
        ]
    )
    return Request(draw.choice(["GET", "DELETE", "PUT", "POST", "OPTIONS", "HEAD"]), path, b"", {})


def _headers(draw: random.Random) -> dict[str, str]:
    headers = {"Content-Type": "application/json", **DEADLINE}
    chance = draw.random()
    if chance < 0.03:
        headers["Content-Type"] = draw.choice(_TYPES)
    elif chance < 0.06:
        headers["Content-Encoding"] = draw.choice(["gzip", "br", "deflate", "gzip, gzip", "x"])
    elif chance < 0.12:
        headers["Transfer-Encoding"] = "chunked"
    elif chance < 0.15:
        headers["X-Request-Timeout-Ms"] = draw.choice(["0", "-1", "1e9", "9" * 40, "x", "5"])
    elif chance < 0.17:
        headers["Authorization"] = draw.choice(
            ["Bearer", "Bearer \x00", "Basic " + "a" * 5000, "é"]
        )
    return headers


def _value(draw: random.Random, body: dict[str, Any]) -> bytes:
    """With one or two of its values swapped for others, or one that is new."""
    copy = json.loads(json.dumps(body))
    told: dict[str, str] = {}
    for _ in range(draw.choice([1, 1, 1, 2])):
        place = _place(draw, copy)
        mark = f"@@{len(told)}@@"
        told[f'"{mark}"'] = draw.choice(VALUES)(draw)
        if isinstance(place, list):
            place[draw.randrange(len(place))] = mark
        elif place and draw.random() < 0.9:
            place[draw.choice(list(place))] = mark
        else:
            place[draw.choice(["x", "", "model", "n", "stream_options", "tools", "user"])] = mark
    text = json.dumps(copy)
    for mark, value in told.items():
        text = text.replace(mark, value)
    if draw.random() < 0.05:  # names twice
        text = text[:-1] + "," + text[1:]
    return text.encode("utf-8", "surrogatepass")


def _place(draw: random.Random, value: Any) -> Any:
    """An object or a list in it that has something in it, or the whole."""
    while True:
        inner = value.values() if isinstance(value, dict) else value
        into = [each for each in inner if isinstance(each, dict | list) and each]
        if not into or draw.random() < 0.4:
            return value
        value = draw.choice(into)


def _bytes(draw: random.Random, raw: bytes) -> bytes:
    data = bytearray(raw)
    for _ in range(draw.choice([1, 1, 2, 5, 30])):
        at = draw.randrange(len(data) + 1)
        what = draw.randrange(6)
        if what == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif what == 1:
            del data[at:]
        elif what == 2:
            data[at:at] = draw.choice([b"\0", b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\r\n", b'"'])
        elif what == 3:
            data[at:at] = draw.randbytes(draw.choice([1, 8, 200]))
        elif what == 4:
            del data[at : at + draw.randrange(20)]
        else:
            data[at:at] = data[at : at + 50] * draw.choice([1, 100])
    return bytes(data)


def bomb() -> bytes:
    """Small, until it is unpacked."""
    return gzip.compress(b'{"prompt":"' + bytes(100 << 20) + b'"}', 1)


MESSAGES = [
    pb.GenerateRequest(text="Once", max_tokens=2, temperature=0.5, stop=["x"], seed=3),
    pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 3]), max_tokens=1, logit_bias={5: 1.0}),
    pb.GenerateRequest(
        messages=pb.Messages(messages=[pb.Message(role="user", content="Hello")]),
        max_tokens=2,
        chat_template_kwargs='{"a": 1}',
        tools=[pb.Tool(name="look", parameters='{"type": "object"}')],
    ),
    pb.GenerateRequest(
        text="a", max_tokens=2, structured_outputs=pb.StructuredOutputs(regex="[ab]+")
    ),
    batch_pb2.SubmitRequest(
        options=batch_pb2.BatchOptions(endpoint="/v1/completions"), lines=["{}"]
    ),
    batch_pb2.ListBatchesRequest(limit=5, after="batch_0"),
]

_METHODS = [
    *["/headrace.v1.Inference/Generate"] * 12,
    *[f"/headrace.v1.Inference/{name}" for name in ("Abort", "GetModelInfo", "GetLoads", "None")],
    *[f"/headrace.v1.Batch/{name}" for name in ("Submit", "Get", "List", "Cancel", "Results")],
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]

WRONG = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
"""What no answer to a mutated message may be."""


def send_message(channel: grpc.Channel, draw: random.Random) -> tuple[str, grpc.StatusCode]:
    """One call with mutated bytes, and its status."""
    raw = draw.choice(MESSAGES).SerializeToString()
    for _ in range(draw.choice([0, 1, 1, 1])):
        raw = _bytes(draw, raw)
    if draw.random() < 0.1:
        text = draw.choice(VALUES)(draw).encode("utf-8", "replace")[:100_000]
        raw = pb.GenerateRequest(
            text="a", max_tokens=1, chat_template_kwargs=text.decode()
        ).SerializeToString()
    method = draw.choice(_METHODS)
    try:
        for _ in channel.stream_stream(method)(iter([raw]), timeout=20):
            pass
    except grpc.RpcError as error:
        return method, error.code()
    return method, grpc.StatusCode.OK


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frames(draw: random.Random) -> bytes:
    """HTTP/2 as it should not be: random frames, with and without a beginning."""
    sent = b"" if draw.random() < 0.2 else _PREFACE
    if draw.random() < 0.8:
        sent += struct.pack(">I", 0)[1:] + b"\x04\0\0\0\0\0"  # an empty SETTINGS
    for _ in range(draw.randrange(1, 12)):
        body = draw.randbytes(draw.choice([0, 4, 8, 40, 5000]))
        length = len(body) if draw.random() < 0.8 else draw.randrange(1 << 24)
        kind, flags, stream = (
            draw.randrange(12),
            draw.randrange(256),
            draw.choice([0, 1, 3, 2**31 - 1]),
        )
        sent += (
            struct.pack(">I", length)[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body
        )
    return sent


def throw(address: tuple[str, int], raw: bytes, wait: float = 0.02) -> None:
    """Send bytes, look a moment at what comes, and go."""
    with socket.create_connection(address, timeout=10) as made:
        try:
            made.sendall(raw)
            made.settimeout(wait)
            made.recv(65536)
        except OSError:
            pass


def check(status: int, body: bytes) -> None:
    if status >= 500:
        code = json.loads(body)["error"]["code"]
        assert (status, code) in STATED, body
    elif status >= 400 and body and body != b"Invalid HTTP request received.":
        assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}


def requests(address: tuple[str, int], seed: int, count: int, limit: float) -> Counter[int]:
    """Send so many over one connection after the other: each is answered rightly, within `limit` seconds.
    How often which status came."""
    draw, came = random.Random(seed), Counter[int]()
    connection = http.client.HTTPConnection(*address, timeout=limit)
    for number in range(count):
        request, began = http_request(draw), time.monotonic()
        told = (
            f"seed {seed}, request {number}: {request.method} {request.path} {request.body[:300]!r}"
        )
        try:
            status, body = request.send(connection)
        except (
            http.client.HTTPException,
            ConnectionError,
            ValueError,
            UnicodeEncodeError,
        ) as error:
            assert not isinstance(error, TimeoutError), told
            connection.close()  # the server's right, of what is no HTTP; ours, of what cannot be sent
            came[0] += 1
            continue
        except TimeoutError as error:
            raise AssertionError(told) from error
        came[status] += 1
        assert time.monotonic() - began < limit, told
        try:
            check(status, b"" if request.method == "HEAD" else body)
        except (AssertionError, ValueError, KeyError) as error:
            raise AssertionError(f"{told}: {status} {body[:500]!r}") from error
    connection.close()
    return came


def messages(address: str, seed: int, count: int) -> Counter[Any]:
    draw, came = random.Random(seed), Counter[Any]()
    with grpc.insecure_channel(address) as channel:
        for number in range(count):
            began = time.monotonic()
            method, code = send_message(channel, draw)
            assert code not in WRONG, f"seed {seed}, message {number}: {method} {code}"
            assert time.monotonic() - began < 30, f"seed {seed}, message {number}: {method}"
            came[code.name] += 1
    return came


def heads(draw: random.Random) -> Iterator[bytes]:
    """Heads of requests that are damaged, without end."""
    whole = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    while True:
        length = draw.choice(
            [b"2", b"-1", b"99999999999999999999", b"2, 2", b"0x2", b"2\r\nContent-Length: 3"]
        )
        yield _bytes(draw, whole + b"Content-Length: " + length + b"\r\n\r\n{}")
