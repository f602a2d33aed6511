"""Batches over gRPC: the service on the wire, the clients in Python, and the command line."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from commands import wait_for
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served import MODEL, EchoEngine, Served, serving, stories_engine
from typer.testing import CliRunner

from headrace.client import (
    AsyncClient,
    Client,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    ServerError,
    UnavailableError,
)
from headrace.cluster.cli.main import app, main
from headrace.cluster.serving.batches.file_store import FileLimits
from headrace.cluster.serving.keys import add_key
from headrace.cluster.serving.rpc import batch_pb2 as pb
from headrace.cluster.serving.rpc.batch_pb2_grpc import BatchStub
from headrace.scheduler.errors import RequestError

Code = grpc.StatusCode
TEXT = "/v1/completions"


@pytest.fixture
def engine(tokenizer: Any) -> Iterator[EchoEngine]:
    made = EchoEngine(tokenizer)
    yield made
    made.gate.set()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def served(engine: EchoEngine, files: Path) -> Iterator[Served]:
    with serving(engine, files=files, grpc_port=0, max_body=5000) as made:
        yield made
        engine.gate.set()


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(str(served.grpc)) as made:
        yield made


@pytest.fixture
def stub(served: Served) -> Iterator[Any]:
    with grpc.insecure_channel(str(served.grpc)) as channel:
        yield BatchStub(channel)  # type: ignore[no-untyped-call]


def row(name: str, **body: Any) -> dict[str, Any]:
    given = {"model": MODEL, "prompt": f"story of {name}", "max_tokens": 4, **body}
    return {"custom_id": name, "method": "POST", "url": TEXT, "body": given}


def rows(count: int) -> list[dict[str, Any]]:
    return [row(f"row {i}") for i in range(count)]


def kept(files: Path) -> list[str]:
    """Names of what lies there of clients."""
    folders = ("files", "uploads", "batches")
    return [path.name for folder in folders for path in (files / folder).iterdir()]


def refusal(ask: Any) -> tuple[Any, str, str | None]:
    """Code, reason and the field that is wrong."""
    with pytest.raises(grpc.RpcError) as caught:
        ask()
    error: Any = caught.value
    trailers = dict(error.trailing_metadata() or ())
    details = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details
    info, wrong = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for each in details:
        each.Unpack(info)
        each.Unpack(wrong)
    field = wrong.field_violations[0].field if wrong.field_violations else None
    return error.code(), info.reason, field


def test_a_batch_is_that_of_http(stories: Path, tmp_path: Path) -> None:
    """The same lines by both ways, seen by both, with the same answers."""
    talk = [row(f"row {i}", temperature=0.9, n=1 + i % 2) for i in range(4)]
    talk += [row("seed", seed=3, logprobs=1), row("wrong", top_p=3.0), row("streams", stream=True)]
    content = "".join(json.dumps(each) + "\n" for each in talk).encode()
    with (
        stories_engine(stories) as engine,
        serving(engine, files=tmp_path / "files", grpc_port=0) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="any") as http,
        Client(str(served.grpc)) as client,
    ):
        job = client.batches.submit(talk, TEXT, metadata={"night": "1"})
        results = list(client.batches.results(job.id, wait=True))
        job = client.batches.get(job.id)
        assert (job.status, job.has_ended, job.metadata) == ("completed", True, {"night": "1"})
        assert (job.total, job.completed, job.failed) == (7, 5, 2)
        assert job.times["created_at"] <= job.times["completed_at"] < job.times["expires_at"]
        seen = http.batches.retrieve(job.id)
        assert (seen.status, seen.output_file_id) == ("completed", job.output_file_id)
        whole = b"".join(
            http.files.content(str(name)).content
            for name in (job.output_file_id, job.error_file_id)
        )
        assert "".join(each.line + "\n" for each in results).encode() == whole
        assert results[-1].next_offset == len(whole)
        sent = http.files.create(file=("in.jsonl", content), purpose="batch")
        other = http.batches.create(input_file_id=sent.id, endpoint=TEXT, completion_window="24h")
        assert http.files.content(job.input_file_id).content.splitlines() == content.splitlines()

        def answers(batch_id: str) -> dict[str, Any]:
            found = [each.data for each in client.batches.results(batch_id, wait=True)]
            for each in found:
                each["response"]["body"].pop("created", None)
            return {each["custom_id"]: each for each in found}

        assert len(answers(job.id)) == 7
        assert answers(job.id) == answers(other.id)


def test_results_go_on_where_they_were_cut(client: Client, stub: Any) -> None:
    talk = [*rows(300), row("wrong", top_p=3.0), row("worse", top_p=4.0)]
    job = client.batches.submit(talk, TEXT)
    whole = list(client.batches.results(job.id, wait=True))
    assert {each.data["custom_id"] for each in whole} == {each["custom_id"] for each in talk}
    assert [each.data["custom_id"] for each in whole[-2:]] == ["wrong", "worse"]
    cut = iter(client.batches.results(job.id))
    assert next(cut) == whole[0]
    cut.close()  # type: ignore[attr-defined]
    # In the middle, before and behind the seam of answers and errors, and at the end.
    for place in (0, 7, 298, 299, 300, 301):
        rest = list(client.batches.results(job.id, whole[place].next_offset))
        assert rest == whole[place + 1 :]
    for offset in (-1, 1, whole[0].next_offset - 1, whole[-1].next_offset + 1, 2**62):
        asked = pb.ResultsRequest(id=job.id, offset=offset)
        found = refusal(lambda asked=asked: list(stub.Results(asked)))
        assert found == (Code.INVALID_ARGUMENT, "INVALID_VALUE", "offset")


def test_results_are_waited_for_or_not(client: Client, engine: EchoEngine) -> None:
    engine.gate.clear()
    job = client.batches.submit(rows(3), TEXT)
    assert job.status == "validating" and not job.has_ended
    with pytest.raises(PreconditionError, match="there are results when it has ended") as early:
        list(client.batches.results(job.id))
    assert early.value.reason == "batch_not_ended"
    with pytest.raises(NotFoundError):
        list(client.batches.results("batch_none", wait=True))
    wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
    coming = client.batches.results(job.id, wait=True)
    engine.gate.set()
    assert len(list(coming)) == 3


def test_a_server_that_stops_has_nobody_wait(
    served: Served, client: Client, engine: EchoEngine
) -> None:
    engine.gate.clear()
    job = client.batches.submit(rows(3), TEXT)
    wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
    refused: list[ServerError] = []

    def ask() -> None:
        with pytest.raises(UnavailableError, match="the server is stopping") as caught:
            list(client.batches.results(job.id, wait=True))
        refused.append(caught.value)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.2)  # until it waits; a call that comes later is refused in the same way
    served.stop()
    asking.join()
    engine.gate.set()
    assert [each.reason for each in refused] == ["server_stopping"]


def test_a_batch_that_is_cancelled(client: Client, engine: EchoEngine) -> None:
    engine.gate.clear()
    job = client.batches.submit(rows(5), TEXT)
    wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
    assert client.batches.cancel(job.id).status == "cancelling"
    engine.gate.set()
    found = [each.data for each in client.batches.results(job.id, wait=True)]
    assert {each["error"]["code"] for each in found} == {"batch_cancelled"} and len(found) == 5
    assert client.batches.get(job.id).status == "cancelled"
    with pytest.raises(InvalidRequestError, match="cannot be cancelled"):
        client.batches.cancel(job.id)


def test_lines_that_are_wrong(client: Client) -> None:
    job = client.batches.submit(['{"custom_id": 1', json.dumps(row("a"))], TEXT)
    assert list(client.batches.results(job.id, wait=True)) == []
    job = client.batches.get(job.id)
    assert (job.status, [(each.code, each.line) for each in job.errors]) == (
        "failed",
        [("invalid_json_line", 1)],
    )


def test_submissions_that_are_refused_leave_nothing(stub: Any, files: Path) -> None:
    options = pb.BatchOptions(endpoint=TEXT)
    good = pb.SubmitRequest(options=options, lines=[json.dumps(row("a"))])
    twice = [good, good]
    for requests, field in (
        ([], "options"),
        ([pb.SubmitRequest(lines=["{}"])], "options"),
        (twice, "options"),
        ([pb.SubmitRequest(options=pb.BatchOptions())], "endpoint"),
        ([pb.SubmitRequest(options=pb.BatchOptions(endpoint="/v1/chat"))], "endpoint"),
        ([pb.SubmitRequest(options=options, lines=["{\n}"])], "lines"),
        (
            [pb.SubmitRequest(options=pb.BatchOptions(endpoint=TEXT, output_expires_after=1))],
            "output_expires_after",
        ),
        (
            [pb.SubmitRequest(options=pb.BatchOptions(endpoint=TEXT, metadata={"a" * 65: "b"}))],
            "metadata",
        ),
    ):
        found = refusal(lambda requests=requests: stub.Submit(iter(requests)))
        assert (found[0], found[2]) == (Code.INVALID_ARGUMENT, field)
    wait_for(lambda: not kept(files), 5.0, lambda: str(kept(files)))
    assert not stub.List(pb.ListBatchesRequest()).batches


def test_a_message_that_is_none(served: Served, files: Path) -> None:
    with grpc.insecure_channel(str(served.grpc)) as channel:
        submit = channel.stream_unary("/headrace.v1.Batch/Submit")
        assert refusal(lambda: submit(iter([b"\xff" * 20])))[0] == Code.INVALID_ARGUMENT
    wait_for(lambda: not kept(files), 5.0, lambda: str(kept(files)))


def test_a_client_that_goes_away_has_made_nothing(
    client: Client, files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By what its rows do, too: half of them are no batch."""

    def failing() -> Iterator[Any]:
        yield from rows(50)
        wait_for(lambda: bool(kept(files)), 10.0, lambda: "nothing has come")
        raise ZeroDivisionError("of its own")

    with pytest.raises(ZeroDivisionError, match="of its own"):
        client.batches.submit(failing(), TEXT)
    for wrong in ({"custom_id": object()}, 7, b"\xff"):
        with pytest.raises(RequestError, match="row 51: "):
            client.batches.submit([*rows(50), wrong], TEXT)  # type: ignore[list-item]
    wait_for(lambda: not kept(files), 10.0, lambda: str(kept(files)))
    assert client.batches.list().batches == []
    assert not caplog.records


def test_no_room(engine: EchoEngine, files: Path) -> None:
    limits = FileLimits(total=20_000, each=9_000)
    with (
        serving(engine, files=files, grpc_port=0, limits=limits) as served,
        Client(str(served.grpc)) as client,
    ):
        with pytest.raises(PreconditionError) as full:
            client.batches.submit(rows(2), TEXT)
        assert full.value.reason == "storage_full"
        with pytest.raises(PreconditionError) as large:
            client.batches.submit(rows(100), TEXT)
        assert large.value.reason == "file_too_large"
        wait_for(lambda: not kept(files), 5.0, lambda: str(kept(files)))


def test_keys_see_their_own(engine: EchoEngine, files: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    ann, bob = add_key(file, "ann", 1), add_key(file, "bob", None)
    with (
        serving(engine, files=files, grpc_port=0, api_keys=file) as served,
        Client(str(served.grpc), api_key=ann) as mine,
        Client(str(served.grpc), api_key=bob) as other,
        Client(str(served.grpc)) as stranger,
    ):
        jobs = [mine.batches.submit(rows(1), TEXT) for _ in range(3)]
        for job in jobs:
            list(mine.batches.results(job.id, wait=True))
        newest = [job.id for job in reversed(jobs)]
        page = mine.batches.list(limit=2)
        assert ([job.id for job in page.batches], page.has_more) == (newest[:2], True)
        page = mine.batches.list(limit=2, after=newest[1])
        assert ([job.id for job in page.batches], page.has_more) == (newest[2:], False)
        assert other.batches.list().batches == []
        for ask in (
            other.batches.get,
            other.batches.cancel,
            lambda i: list(other.batches.results(i)),
        ):
            with pytest.raises(NotFoundError):
                ask(newest[0])
        with pytest.raises(InvalidRequestError) as wrong:
            mine.batches.list(limit=101)
        assert wrong.value.param == "limit"
        with pytest.raises(ServerError, match="give an API key"):
            stranger.batches.submit(rows(1), TEXT)
        # One at once, with calls of this service among them.
        engine.gate.clear()
        job = mine.batches.submit(rows(1), TEXT)
        coming = mine.batches.results(job.id, wait=True)
        head = {"Authorization": f"Bearer {ann}"}
        wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
        collected: list[Any] = []
        reading = threading.Thread(target=lambda: collected.extend(coming))
        reading.start()
        wait_for(
            lambda: served.ask("GET", "/v1/models", headers=head)[0] == 429, 10.0, lambda: "let in"
        )
        engine.gate.set()
        reading.join()
        assert len(collected) == 1


def test_a_server_without_files(engine: EchoEngine) -> None:
    with serving(engine, grpc_port=0) as served, Client(str(served.grpc)) as client:
        with pytest.raises(ServerError, match="start it with --files DIR") as refused:
            client.batches.submit(rows(1), TEXT)
        assert (refused.value.code, refused.value.reason) == ("UNIMPLEMENTED", "files_not_kept")
        with pytest.raises(ServerError, match="start it with --files DIR"):
            client.batches.list()


def test_health(served: Served) -> None:
    with grpc.insecure_channel(str(served.grpc)) as channel:
        ask = health_pb2_grpc.HealthStub(channel).Check
        assert ask(health_pb2.HealthCheckRequest(service="headrace.v1.Batch")).status == 1


def test_asyncio(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    async def ask() -> None:
        async with AsyncClient(str(served.grpc)) as client:
            job = await client.batches.submit(rows(30), TEXT, metadata={"a": "b"})
            found = [each async for each in client.batches.results(job.id, wait=True)]
            assert len(found) == 30
            rest = [each async for each in client.batches.results(job.id, found[9].next_offset)]
            assert rest == found[10:]
            assert (await client.batches.get(job.id)).status == "completed"
            with pytest.raises(InvalidRequestError):
                await client.batches.cancel(job.id)
            with pytest.raises(RequestError, match="row 31: "):
                await client.batches.submit([*rows(30), 7], TEXT)  # type: ignore[list-item]
            with pytest.raises(InvalidRequestError):
                await client.batches.submit(rows(30), "/v1/none")
            with pytest.raises(RequestError, match="a batch: "):
                await client.batches.submit(rows(1), TEXT, metadata={"a": 1})  # type: ignore[dict-item]
            page = await client.batches.list()
            assert [each.id for each in page.batches] == [job.id]

    asyncio.run(ask())
    assert not caplog.records


def test_the_command_line(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--address", str(served.grpc)]

    def run(*arguments: str, given: str | None = None) -> str:
        found = CliRunner().invoke(
            app, ["client", "batch", *arguments, *at], input=given, catch_exceptions=False
        )
        assert found.exit_code == 0, found.output
        return found.stdout

    lines = "".join(json.dumps(each) + "\n" for each in [*rows(20), row("wrong", top_p=3.0)])
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text(lines)
    name = run("submit", str(file), "--metadata", "night=1").strip()
    printed = run("results", name, "--wait")
    assert len(printed.splitlines()) == 21
    assert run("status", name) == f"{name}  completed    20 answered, 1 failed of 21 lines\n"
    assert json.loads(run("status", name, "--json"))["metadata"] == {"night": "1"}
    # As after a kill in the middle of a line.
    output.write_text(printed[: len(printed) // 2])
    for _ in range(2):
        run("results", name, "--output", str(output))
        assert output.read_text() == printed
    wrong = run("submit", "-", "--endpoint", TEXT, given="{}\n").strip()
    run("results", wrong, "--wait")
    told = run("list").splitlines()
    assert [each.split()[:2] for each in (told[0], told[-1])] == [
        [wrong, "failed"],
        [name, "completed"],
    ]
    assert "line 1: " in told[1]
    file.write_text("nothing\n")
    for arguments, why in (
        (("submit", str(file)), "the first line has no url: give --endpoint"),
        (("submit", str(file), "--endpoint", TEXT, "--metadata", "a"), "give NAME=VALUE"),
        (("cancel", name), "it cannot be cancelled"),
        (("results", "batch_none"), "there is no batch"),
        (("results", name, "--output", str(tmp_path)), "cannot write --output"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["client", "batch", *arguments, *at])
        assert ended.value.code == 1 and why in capsys.readouterr().err
