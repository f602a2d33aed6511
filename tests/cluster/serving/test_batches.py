"""OpenAI's files and batches, with their client against the bundled model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from commands import wait_for
from served import MODEL, Served, serving, stories_engine

from headrace.cluster.jobs import Job, JobFiles
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


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as made:
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
        assert body.usage == asked.usage
    refused = rows(client, batch.error_file_id)
    assert refused.keys() == {"wrong", "streams"}
    params = {
        name: row["response"]["body"]["error"]["param"] for name, row in refused.items()
    }
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
