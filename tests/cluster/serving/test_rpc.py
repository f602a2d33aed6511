"""gRPC as it goes over the wire, before an engine that answers every prompt with itself."""

import asyncio
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import make_certificate
from commands import wait_for
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from served import EchoEngine, Served, serving

from headrace.cluster.serving.keys import add_key
from headrace.cluster.serving.rpc import inference_pb2 as pb
from headrace.cluster.serving.rpc.inference_pb2_grpc import InferenceStub
from headrace.cluster.serving.server import Listener, Server, ServerOptions
from headrace.scheduler.errors import HeadraceError, StageError
from headrace.scheduler.request import Priority

Code = grpc.StatusCode
TEXT = "héllo 世界 😀 ok"
NAME = "headrace.v1.Inference"
GENERATE = f"/{NAME}/Generate"
SERVING, NOT_SERVING = 1, 2


@pytest.fixture
def engine(tokenizer: Any) -> Iterator[EchoEngine]:
    made = EchoEngine(tokenizer, max_context=4000)
    yield made
    made.gate.set()


@pytest.fixture
def served(engine: EchoEngine) -> Iterator[Served]:
    with serving(engine, grpc_port=0, max_body=4096, max_waiting=3, grace=1.0) as made:
        yield made
        engine.gate.set()


@pytest.fixture(scope="module")
def echoes(tokenizer: Any) -> Iterator[Served]:
    """For tests that leave the engine alone."""
    engine = EchoEngine(tokenizer, max_context=4000)
    with serving(engine, grpc_port=0, max_body=4096, max_waiting=3) as made:
        yield made


@contextmanager
def stub(served: Served, **options: Any) -> Iterator[Any]:
    with grpc.insecure_channel(served.grpc, **options) as channel:
        yield InferenceStub(channel)


def asked(text: str = TEXT, **given: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"text": text, "max_tokens": 90, **given})


def generate(served: Served, secret: str | None = None, **given: Any) -> str:
    with stub(served) as client:
        told = bearer(secret) if secret else None
        return "".join(each.piece.text for each in client.Generate(asked(**given), metadata=told))


def bearer(secret: str) -> Any:
    return (("authorization", f"Bearer {secret}"),)


def refusal(call: Any) -> tuple[Any, dict[str, Any]]:
    """The code, and the details by their type."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    error: Any = caught.value
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    kinds = (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.RetryInfo,
    )
    found: dict[str, Any] = {"message": error.details()}
    for detail in status.details:
        for kind in kinds:
            made = kind()
            if detail.Unpack(made):
                found[kind.DESCRIPTOR.name] = made
    return error.code(), found


def test_pieces_add_up_and_none_ends_in_half_a_character(echoes: Served) -> None:
    echoes.engine.pace = 0.02  # a client that is late gets several tokens in a piece
    with stub(echoes) as client:
        *pieces, last = client.Generate(asked(request_id="mine"))
    echoes.engine.pace = 0.0
    texts = [each.piece.text for each in pieces]
    assert "".join(texts) == TEXT and len(texts) > 1
    assert not any("\ufffd" in text for text in texts)
    tokens = echoes.tokens(TEXT)
    assert [token for each in pieces for token in each.piece.token_ids] == tokens
    reasons = [each.piece.finish_reason for each in pieces]
    assert reasons[-1] == pb.FINISH_REASON_LENGTH and not any(reasons[:-1])
    count = len(tokens)
    assert last.usage == pb.Usage(
        prompt_tokens=count, completion_tokens=count, total_tokens=2 * count
    )
    assert {each.request_id for each in [*pieces, last]} == {"mine"}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 4}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"logit_bias": {5: 200.0}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"priority": 7}, "priority"),
        ({"deadline_ms": 10**12}, "deadline_ms"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"token_ids": {"ids": [5000]}, "text": None}, "prompt"),
        ({"token_ids": {}, "text": None}, "prompt"),
        ({"text": None}, "prompt"),
        ({"text": "a" * 4050}, "prompt"),
        ({"messages": {}, "text": None}, "messages"),
        ({"messages": {"messages": [{"role": "user", "content": "a"}]}, "text": None,
          "chat_template_kwargs": "[1]"}, "chat_template_kwargs"),
        ({"messages": {"messages": [{"role": "user", "content": "a"}]}, "text": None,
          "tools": [{"name": "f", "parameters": "{"}]}, "tools"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(echoes: Served, given: dict[str, Any], param: str) -> None:
    with stub(echoes) as client:
        code, details = refusal(client.Generate(asked(**given)))
    assert code == Code.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == param
    body = {"model": "stories", "prompt": TEXT, "max_tokens": 90}
    if param in ("temperature", "max_tokens", "n", "logprobs") and given[param] == given[param]:
        answer = echoes.ask("POST", "/v1/completions", {**body, **given})[1]
        assert details["message"] == answer["error"]["message"]


def test_a_model_that_is_not_there(echoes: Served) -> None:
    with stub(echoes) as client:
        code, details = refusal(client.Generate(asked(model="another")))
    assert code == Code.NOT_FOUND and details["ErrorInfo"].reason == "MODEL_NOT_FOUND"
    assert "'stories'" in details["message"]


def test_a_message_of_an_error_fits_into_trailers(echoes: Served) -> None:
    with stub(echoes) as client:
        code, details = refusal(client.Generate(asked(model="世" * 1000)))
    assert code == Code.NOT_FOUND and len(details["message"].encode()) <= 1000


def test_what_is_known_of_a_server(echoes: Served) -> None:
    with stub(echoes) as client:
        model = client.GetModelInfo(pb.GetModelInfoRequest())
        assert (model.name, model.digest, model.max_model_len) == ("stories", "echo", 4000)
        assert model.has_chat_template and model.vocabulary_size == 4096
        info = client.GetServerInfo(pb.GetServerInfoRequest())
        assert info.is_ready and (info.max_body, info.max_waiting) == (4096, 3)


def test_loads(served: Served, engine: EchoEngine) -> None:
    with stub(served) as client:
        generate(served)
        engine.gate.clear()
        call = client.Generate(asked())
        wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
        loads = client.GetLoads(pb.GetLoadsRequest())
        assert loads.open_requests == 1 and loads.pass_seconds > 0
        engine.gate.set()
        list(call)


def test_a_cancelled_call_gives_its_pages_back(
    served: Served, engine: EchoEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.pace = 0.01
    with stub(served) as client:
        call = client.Generate(asked(text="a" * 2000, max_tokens=2000, n=2))
        next(call)
        call.cancel()
        wait_for(lambda: sorted(engine.aborted) == [1, 2], 10.0, lambda: "it goes on")
        # A client that is gone altogether:
        with stub(served) as other:
            left = other.Generate(asked(text="a" * 2000, max_tokens=2000))
            next(left)
        wait_for(lambda: engine.aborted[2:] == [3], 10.0, lambda: "it goes on")
        assert generate(served) == TEXT
    assert not caplog.records


def test_a_request_is_aborted_by_its_name(served: Served, engine: EchoEngine) -> None:
    engine.gate.clear()
    with stub(served) as client:
        call = client.Generate(asked(request_id="one"))
        wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
        code, details = refusal(client.Generate(asked(request_id="one")))
        assert code == Code.ALREADY_EXISTS and "'one' is running" in details["message"]
        assert client.Abort(pb.AbortRequest(request_id="one")).was_running
        assert refusal(call)[0] == Code.CANCELLED
        engine.gate.set()
        wait_for(lambda: engine.aborted == [1], 10.0, lambda: "it goes on")
        assert not client.Abort(pb.AbortRequest(request_id="one")).was_running
        assert generate(served, request_id="one") == TEXT


def test_a_call_ends_with_its_deadline(served: Served, engine: EchoEngine) -> None:
    engine.gate.clear()
    with stub(served) as client:
        began = time.monotonic()
        assert refusal(client.Generate(asked(), timeout=0.2))[0] == Code.DEADLINE_EXCEEDED
        assert refusal(client.Generate(asked(max_ttft_ms=200)))[0] == Code.DEADLINE_EXCEEDED
        assert time.monotonic() - began < 5.0
        engine.gate.set()
        wait_for(lambda: sorted(engine.aborted) == [1, 2], 10.0, lambda: "it goes on")


def test_a_deadline_that_cannot_be_kept_is_refused_at_once(
    served: Served, engine: EchoEngine
) -> None:
    engine.pace = 0.1
    with stub(served) as client:
        list(client.Generate(asked(max_tokens=4), timeout=60))
        # A pass takes 0.1 s, and there are 40 to come.
        first = client.Generate(asked(text="a b " * 20, max_tokens=40))
        next(first)
        began = time.monotonic()
        code, details = refusal(client.Generate(asked(text="a b " * 20, max_tokens=40), timeout=1))
        assert time.monotonic() - began < 0.5
        assert code == Code.RESOURCE_EXHAUSTED
        assert details["ErrorInfo"].reason == "DEADLINE_UNREACHABLE"
        assert details["RetryInfo"].retry_delay.seconds >= 1
        first.cancel()


def test_a_full_queue(served: Served, engine: EchoEngine) -> None:
    engine.gate.clear()
    with stub(served) as client:
        calls = [client.Generate(asked()) for _ in range(3)]
        wait_for(lambda: waiting(served) == 3, 10.0, lambda: "not begun")
        code, details = refusal(client.Generate(asked()))
        assert code == Code.RESOURCE_EXHAUSTED and details["RetryInfo"].retry_delay.seconds == 2
        assert details["ErrorInfo"].reason == "QUEUE_FULL"
        engine.gate.set()
        assert all("".join(each.piece.text for each in call) == TEXT for call in calls)


def waiting(served: Served) -> int:
    with stub(served) as client:
        return int(client.GetLoads(pb.GetLoadsRequest()).open_requests)


def test_keys(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    ann, bob = add_key(file, "ann", 1, 3), add_key(file, "bob", None)
    engine = EchoEngine(tokenizer, max_context=4000)
    with serving(engine, grpc_port=0, api_keys=file) as served, stub(served) as client:
        for told in (None, bearer("hr-wrong"), bearer(ann) * 2, (("authorization", ann),)):
            code, details = refusal(client.Generate(asked(), metadata=told))
            assert code == Code.UNAUTHENTICATED and "API key" in details["message"]
            with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                client.GetLoads(pb.GetLoadsRequest(), metadata=told)
        with grpc.insecure_channel(served.grpc) as channel:
            with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                list(reflected(channel))
            ask = health_pb2_grpc.HealthStub(channel).Check
            assert ask(health_pb2.HealthCheckRequest()).status == SERVING
        assert generate(served, ann, priority=pb.PRIORITY_BATCH) == TEXT
        assert (engine.tenants, engine.classes) == (["ann"], [(Priority.BATCH, 3)])
        engine.gate.clear()
        call = client.Generate(asked(request_id="one"), metadata=bearer(ann))
        wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
        code, details = refusal(client.Generate(asked(), metadata=bearer(ann)))
        assert code == Code.RESOURCE_EXHAUSTED and "RetryInfo" in details
        # It is the same limit over HTTP.
        body = {"prompt": "a", "max_tokens": 1}
        headers = {"Authorization": f"Bearer {ann}"}
        assert served.ask("POST", "/v1/completions", body, headers)[0] == 429
        abort = pb.AbortRequest(request_id="one")
        assert not client.Abort(abort, metadata=bearer(bob)).was_running
        assert client.Abort(abort, metadata=bearer(ann)).was_running
        assert refusal(call)[0] == Code.CANCELLED
        engine.gate.set()


def test_tls(tokenizer: Any, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    engine = EchoEngine(tokenizer)
    with serving(engine, grpc_port=0, tls_cert=cert, tls_key=key) as served:
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        with grpc.secure_channel(served.grpc, credentials) as channel:
            made = InferenceStub(channel).Generate(asked())
            assert "".join(each.piece.text for each in made) == TEXT
        with stub(served) as client:
            assert refusal(client.Generate(asked(), timeout=5))[0] == Code.UNAVAILABLE


def test_health_and_a_stop_that_lets_answers_finish(served: Served, engine: EchoEngine) -> None:
    engine.gate.clear()
    with grpc.insecure_channel(served.grpc) as channel:
        client, health = InferenceStub(channel), health_pb2_grpc.HealthStub(channel)
        for name in ("", NAME):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service=NAME))
        assert next(watch).status == SERVING
        call = client.Generate(asked())
        wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
        served.stop()
        assert next(watch).status == NOT_SERVING
        code, details = refusal(client.Generate(asked()))
        assert code == Code.UNAVAILABLE and details["ErrorInfo"].reason == "NOT_READY"
        engine.gate.set()
        assert "".join(each.piece.text for each in call) == TEXT
        assert refusal(watch)[0] in (Code.UNAVAILABLE, Code.CANCELLED)


def test_a_stop_ends_when_the_grace_is_over(served: Served, engine: EchoEngine) -> None:
    engine.pace = 0.01
    with stub(served) as client:
        call = client.Generate(asked(text="a" * 3500, max_tokens=3500))
        next(call)
        began = time.monotonic()
        served.stop()
        code, details = refusal(call)
        assert (code, details["ErrorInfo"].reason) == (Code.UNAVAILABLE, "SERVER_STOPPING")
        assert 0.5 < time.monotonic() - began < 8.0


def test_an_engine_that_fails(engine: EchoEngine) -> None:
    engine.gate.clear()
    with (
        pytest.raises(StageError, match="stage 1 died"),
        serving(engine, grpc_port=0) as served,
        stub(served) as client,
    ):
        call = client.Generate(asked())
        wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
        engine.failure = StageError("stage 1 died")
        engine.gate.set()
        code, details = refusal(call)
        assert (code, details["message"]) == (Code.INTERNAL, "the engine failed")


def test_a_client_that_does_not_read_holds_nobody_up(served: Served, engine: EchoEngine) -> None:
    window = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    with stub(served, options=window) as client:
        slow = client.Generate(
            asked(text="a" * 3500, max_tokens=3500, logprobs=0, request_id="slow")
        )
        next(slow)
        assert [generate(served) for _ in range(3)] == [TEXT] * 3
        wait_for(lambda: not engine.has_work, 20.0, lambda: "held up")
        slow.cancel()


def reflected(channel: Any, **given: Any) -> Iterator[Any]:
    made = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(**given or {"list_services": ""})
    yield from made.ServerReflectionInfo(iter([request]))


def test_reflection_is_all_that_a_stranger_needs(echoes: Served) -> None:
    """As grpcurl does it: services, descriptors, and a call of JSON."""
    with grpc.insecure_channel(echoes.grpc) as channel:
        (listed,) = reflected(channel)
        names = {each.name for each in listed.list_services_response.service}
        assert {NAME, "headrace.v1.Batch", "grpc.health.v1.Health"} <= names
        (found,) = reflected(channel, file_containing_symbol=NAME)
        pool = descriptor_pool.DescriptorPool()
        for raw in found.file_descriptor_response.file_descriptor_proto:
            pool.Add(descriptor_pb2.FileDescriptorProto.FromString(raw))
        method = pool.FindServiceByName(NAME).methods_by_name["Generate"]
        request, response = map(
            message_factory.GetMessageClass, (method.input_type, method.output_type)
        )
        call = channel.unary_stream(GENERATE, request.SerializeToString, response.FromString)
        given = json_format.ParseDict({"text": TEXT, "maxTokens": 90}, request())
        assert "".join(each.piece.text for each in call(given)) == TEXT


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return (
        struct.pack(">I", len(payload))[1:]
        + bytes([kind, flags])
        + struct.pack(">I", stream)
        + payload
    )


def hostile() -> list[bytes]:
    rng, opening = random.Random(1), PREFACE + frame(4, 0, 0, b"")
    return [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        rng.randbytes(4096),
        PREFACE + rng.randbytes(4096),
        opening + b"\xff\xff\xff\x01\x04\x00\x00\x00\x01",  # headers of 16 MiB that never come
        opening + frame(1, 4, 1, rng.randbytes(64)),  # headers that are none
        opening + frame(0, 1, 1, b"\x00\xff\xff\xff\xff"),  # data of no stream
        *(opening + frame(rng.randrange(12), rng.randrange(256), 1, rng.randbytes(40))
          for _ in range(20)),
    ]  # fmt: skip


def test_frames_that_are_none_leave_the_server_up(echoes: Served) -> None:
    host, _, port = str(echoes.grpc).rpartition(":")
    opened = []
    for raw in hostile():
        made = socket.create_connection((host, int(port)), timeout=5)
        opened.append(made)
        made.sendall(raw)
    assert generate(echoes) == TEXT
    for made in opened:
        made.close()
    assert generate(echoes) == TEXT


def raw_call(served: Served, payload: bytes, **options: Any) -> Any:
    with grpc.insecure_channel(served.grpc) as channel:
        call = channel.unary_stream(GENERATE, lambda sent: sent, lambda got: got)
        return refusal(call(payload, timeout=10, **options))


def test_messages_that_are_none_leave_the_server_up(
    echoes: Served, caplog: pytest.LogCaptureFixture
) -> None:
    whole = asked(text="a" * 100, logit_bias={1: 1.0}).SerializeToString()
    rng = random.Random(2)
    for raw in (whole[:50], b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x07", rng.randbytes(1000)):
        assert raw_call(echoes, raw)[0] == Code.INVALID_ARGUMENT
    nested = b"\xa3\x06" * 1500  # groups that nobody knows, in each other
    assert raw_call(echoes, nested)[0] == Code.INVALID_ARGUMENT
    code, details = raw_call(echoes, asked(text="a" * 5000).SerializeToString())
    assert code == Code.RESOURCE_EXHAUSTED and "larger than max" in details["message"]
    # Small until it is unpacked.
    bomb = asked(text="a" * 1_000_000).SerializeToString()
    code, details = raw_call(echoes, bomb, compression=grpc.Compression.Gzip)
    assert code == Code.UNIMPLEMENTED
    with grpc.insecure_channel(echoes.grpc) as channel:
        missing = channel.unary_unary(f"/{NAME}/Nothing")
        with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
            missing(b"")
    assert generate(echoes) == TEXT
    assert not caplog.records


def test_ports_that_are_taken(tokenizer: Any) -> None:
    with serving(EchoEngine(tokenizer), grpc_port=0) as served:
        port: Any = int(str(served.grpc).rpartition(":")[2])
        with pytest.raises(HeadraceError, match=f"--grpc-port {port}: Address already in use"):
            Listener(ServerOptions("m", port=0, grpc_port=port))
    with pytest.raises(HeadraceError, match="are both 7999"):
        Listener(ServerOptions("m", port=7999, grpc_port=7999))
    with (
        Listener(ServerOptions("m", port=0, grpc_port=0)) as at,
        socket.socket() as other,
    ):
        host, _, port = str(at.grpc_address).rpartition(":")
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((host, int(port)))
        other.listen()  # while the model was loaded
        with pytest.raises(HeadraceError, match="cannot serve gRPC at 127"):
            asyncio.run(Server(at, EchoEngine(tokenizer)).run(print, signals=False))


def test_calls_are_counted(served: Served) -> None:
    generate(served)
    with stub(served) as client:
        refusal(client.Generate(asked(n=0)))

    def count(status: str) -> float:
        path = f'path="{NAME}/Generate",status="{status}"'
        return served.metric(f"headrace_requests_total{{{path}}}")

    wait_for(lambda: (count("OK"), count("INVALID_ARGUMENT")) == (1, 1), 5.0, lambda: "not counted")


@pytest.mark.parametrize("proto", ["inference", "batch"])
def test_generated_code_is_of_the_proto(tmp_path: Path, proto: str) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc")
    source = Path(pb.__file__).parent
    made = source.resolve().parents[2] / "src"
    name = f"headrace/cluster/serving/rpc/{proto}.proto"
    outs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["protoc", f"-I{made}", *outs, f"{made}/{name}"]) == 0
    for each in (f"{proto}_pb2.py", f"{proto}_pb2.pyi", f"{proto}_pb2_grpc.py"):
        generated = tmp_path / name
        assert (generated.parent / each).read_text() == (source / each).read_text(), each


def test_many_at_once(echoes: Served) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(generate(echoes))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [TEXT] * 3
