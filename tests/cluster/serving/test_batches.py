"""OpenAI's files and batches, with their client against the bundled model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from commands import wait_for
from served import MODEL, Served, serving, stories_engine

from headrace.cluster.job_files import JobFiles
from headrace.cluster.jobs import Job
from headrace.scheduler.request import SamplingParams

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served") / "files"


@pytest.fixture(scope="module")
def served(stories: Path, files: Path) -> Iterator[Served]:
    with stories_engine(stories) as engine, serving(engine, files=files) as made:
        yield made


def line(custom_id: str, url: str = TEXT, **body: Any) -> dict[str, Any]:
    given = {"model": MODEL, "max_tokens": 4, **body}
    if url == TEXT:
        given = {"prompt": "Once upon a time", **given}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": given}


def encoded(lines: list[Any]) -> bytes:
    return b"".join(
        (each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines
    )


def upload(client: openai.OpenAI, lines: list[Any]) -> str:
    return client.files.create(file=("in.jsonl", encoded(lines)), purpose="batch").id


def start(client: openai.OpenAI, lines: list[Any], url: Any = TEXT, **given: Any) -> str:
    made = client.batches.create(
        input_file_id=upload(client, lines), endpoint=url, completion_window="24h", **given
    )
    return made.id


def end(client: openai.OpenAI, batch_id: str) -> Any:
    """The batch, once it has ended."""
    wait_for(
        lambda: client.batches.retrieve(batch_id).status in ENDED,
        60.0,
        lambda: str(client.batches.retrieve(batch_id)),
    )
    return client.batches.retrieve(batch_id)


def rows(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    if file_id is None:
        return {}
    found = [json.loads(each) for each in client.files.content(file_id).text.splitlines()]
    made = {row["custom_id"]: row for row in found}
    assert len(made) == len(found)
    return made


def test_a_batch_from_its_file_to_its_answers(client: openai.OpenAI) -> None:
    talk = [{"role": "user", "content": "Tell me a story."}]
    lines = [line(f"chat {i}", CHAT, messages=talk, seed=i, n=1 + i % 2) for i in range(5)]
    lines.insert(2, line("wrong", CHAT, messages=talk, temperature=-1))
    lines.insert(4, line("streams", CHAT, messages=talk, stream=True))
    batch_id = start(client, lines, CHAT, metadata={"night": "1"})
    batch = end(client, batch_id)
    assert (batch.status, batch.metadata) == ("completed", {"night": "1"})
    assert batch.request_counts.model_dump() == {"total": 7, "completed": 5, "failed": 2}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    answered = rows(client, batch.output_file_id)
    assert list(answered.keys() - {f"chat {i}" for i in range(5)}) == []
    for i in range(5):
        row = answered[f"chat {i}"]
        assert (row["response"]["status_code"], row["error"]) == (200, None)
        asked = client.chat.completions.create(
            model=MODEL, messages=talk, seed=i, n=1 + i % 2, max_tokens=4
        )
        body = openai.types.chat.ChatCompletion.model_validate(row["response"]["body"])
        assert body.choices == asked.choices
        assert body.usage == asked.usage.model_copy(update={"prompt_tokens_details": None})
    refused = rows(client, batch.error_file_id)
    assert refused.keys() == {"wrong", "streams"}
    params = {name: row["response"]["body"]["error"]["param"] for name, row in refused.items()}
    assert params == {"wrong": "temperature", "streams": "stream"}
    assert {row["response"]["status_code"] for row in refused.values()} == {400}


def test_a_batch_answers_as_a_job_of_generate(
    stories: Path, client: openai.OpenAI, tmp_path: Path
) -> None:
    lines = [line(f"row {i}", temperature=0.9, n=1 + i % 2) for i in range(6)]
    lines += [line(f"seed {i}", seed=i, logprobs=1) for i in range(2)]
    batch = end(client, start(client, lines))
    (tmp_path / "in.jsonl").write_bytes(encoded(lines))
    with stories_engine(stories) as engine:
        files = JobFiles(
            tmp_path / "in.jsonl", tmp_path / "out.jsonl", engine.model_digest, SamplingParams()
        )
        Job(engine, engine.tokenizer, files, model_name=MODEL).run(lambda _: None)
    jobs = {
        row["custom_id"]: row["response"]["body"]
        for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    }
    answered = rows(client, batch.output_file_id)
    assert answered.keys() == jobs.keys()
    for name, job in jobs.items():
        body = answered[name]["response"]["body"]
        assert (body["choices"], body["usage"]) == (job["choices"], job["usage"])


def broken(client: openai.OpenAI, lines: list[Any], url: str = TEXT) -> list[tuple[Any, ...]]:
    """What a batch fails of, at once."""
    batch = end(client, start(client, lines, url))
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.failed_at and batch.in_progress_at is None
    return [(fault.line, fault.code, fault.param) for fault in batch.errors.data]


def test_a_file_is_checked_before_any_of_it_runs(client: openai.OpenAI) -> None:
    good = line("good")
    assert broken(client, [
        good,
        b'{"custom_id": ',
        b"",
        b"[1]",
        b"[" * 5000,
        b"\xff\xfe\x00",
        line("good"),
        line("other", CHAT, messages=[]),
        {**line("get"), "method": "GET"},
        {**line("elsewhere"), "url": "https://example.com/v1/completions"},
        {**line("more"), "priority": 1},
        {**line("none"), "body": "text"},
        {**line("none"), "custom_id": 5},
        {"method": "POST", "url": TEXT, "body": {}},
        line("model", model="gpt-5"),
    ]) == [
        (2, "invalid_json_line", None),
        (4, "invalid_json_line", None),
        (5, "invalid_json_line", None),
        (6, "invalid_json_line", None),
        (7, "duplicate_custom_id", "custom_id"),
        (8, "mismatched_url", "url"),
        (9, "invalid_line", "method"),
        (10, "invalid_line", "url"),
        (11, "invalid_line", "priority"),
        (12, "invalid_line", "body"),
        (13, "invalid_line", "custom_id"),
        (14, "invalid_line", "custom_id"),
        (15, "model_not_found", "body.model"),
    ]  # fmt: skip


def test_lines_and_files_of_no_use(client: openai.OpenAI) -> None:
    huge = b'{"custom_id": "' + b"x" * (5 << 20) + b'"}'
    assert broken(client, [line("a"), huge, line("a"), huge[:-1]]) == [
        (2, "line_too_long", None),
        (3, "duplicate_custom_id", "custom_id"),
        (4, "line_too_long", None),
    ]
    assert broken(client, []) == [(None, "empty_file", None)]
    assert broken(client, [b"", b"  "]) == [(None, "empty_file", None)]
    assert len(broken(client, [b"{}"] * 200)) == 50


@pytest.mark.parametrize(
    ("given", "status", "param"),
    [
        ({"input_file_id": "file-nowhere"}, 404, "id"),
        ({"input_file_id": "../../lock"}, 404, "id"),
        ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
        ({"completion_window": "1h"}, 400, "completion_window"),
        ({"metadata": {"a": "b" * 513}}, 400, "metadata"),
        ({"metadata": {str(i): "b" for i in range(17)}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, 400, None),
        ({"extra_body": {"priority": "high"}}, 400, "priority"),
    ],
)
def test_batches_that_are_refused(
    client: openai.OpenAI, given: Any, status: int, param: str | None
) -> None:
    asked = {"input_file_id": "file-x", "endpoint": TEXT, "completion_window": "24h", **given}
    with pytest.raises(openai.APIStatusError) as caught:
        client.batches.create(**asked)
    assert caught.value.status_code == status
    assert param is None or caught.value.param == param


def test_a_cancelled_batch_gives_its_pages_back(client: openai.OpenAI, served: Served) -> None:
    endless = {"max_tokens": 900, "ignore_eos": True}
    input_id = upload(client, [line(f"{i}", **({} if i < 2 else endless)) for i in range(300)])
    batch_id = client.batches.create(
        input_file_id=input_id,
        endpoint=TEXT,
        completion_window="24h",
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    ).id

    def has_begun() -> bool:
        return client.batches.retrieve(batch_id).request_counts.completed == 2

    wait_for(has_begun, 30.0, lambda: str(client.batches.retrieve(batch_id)))
    assert served.metric("headrace_running_sequences") > 0
    with pytest.raises(openai.BadRequestError, match="cancel the batch first"):
        client.files.delete(input_id)
    talked = client.completions.create(model=MODEL, prompt="A dog", max_tokens=3)
    assert talked.usage.completion_tokens == 3
    assert client.batches.cancel(batch_id).status == "cancelling"
    used = 'headrace_kv_pages{state="used",tier="device"}'
    wait_for(lambda: served.metric(used) == 0, 2.0, lambda: str(served.metric(used)))
    batch = end(client, batch_id)
    assert batch.status == "cancelled"
    assert batch.request_counts.model_dump() == {"total": 300, "completed": 2, "failed": 298}
    assert rows(client, batch.output_file_id).keys() == {"0", "1"}
    errors = rows(client, batch.error_file_id)
    assert errors.keys() == {str(i) for i in range(2, 300)}
    assert {row["error"]["code"] for row in errors.values()} == {"batch_cancelled"}
    kept = client.files.retrieve(batch.output_file_id)
    assert kept.purpose == "batch_output"
    assert kept.expires_at == kept.created_at + 3600
    with pytest.raises(openai.BadRequestError, match="cancelled: it cannot"):
        client.batches.cancel(batch_id)
    client.files.delete(input_id)


def test_batches_are_listed_the_newest_first(client: openai.OpenAI) -> None:
    ids = [start(client, [line("a")]) for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=2)][:3] == ids[::-1]
    page = client.batches.list(limit=1, after=ids[1])
    assert ([batch.id for batch in page.data], page.has_more) == ([ids[0]], True)
    assert {end(client, each).status for each in ids} == {"completed"}


def test_prompts_and_answers_of_every_shape(client: openai.OpenAI) -> None:
    lines = [
        line("many", prompt=["Once", "A dog"], n=2, temperature=0),
        line("ids", prompt=[5, 6, 7]),
        line("long", prompt="a " * 2000),
        line("tools", tools=[]),
        line("\ud800", prompt="x"),
        line("streams not", stream=False),
    ]
    batch = end(client, start(client, lines))
    answered = rows(client, batch.output_file_id)
    many = answered["many"]["response"]["body"]
    texts = [choice["text"] for choice in many["choices"]]
    asked = client.completions.create(
        model=MODEL, prompt=["Once", "A dog"], n=2, temperature=0, max_tokens=4
    )
    assert texts == [choice.text for choice in asked.choices]
    assert many["usage"]["prompt_tokens"] == asked.usage.prompt_tokens
    assert answered.keys() == {"many", "ids", "\ud800", "streams not"}
    codes = {
        name: row["response"]["body"]["error"]["code"]
        for name, row in rows(client, batch.error_file_id).items()
    }
    assert codes == {"long": "context_length_exceeded", "tools": "unknown_parameter"}
