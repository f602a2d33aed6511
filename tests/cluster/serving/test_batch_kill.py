"""A server that is killed, and one after it. Run as a program, this file is the server of an echo."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from commands import Command, headrace, wait_for
from served import MODEL, EchoEngine, serving

from headrace.cluster.tokenizer import load_tokenizer

TEXT = "/v1/completions"
LINES = 400


def line(number: int, model: str, **body: Any) -> dict[str, Any]:
    given = {"model": model, "prompt": f"{number}", "max_tokens": 4, **body}
    if number % 50 == 7:
        given["temperature"] = -1
    return {"custom_id": f"{number}", "method": "POST", "url": TEXT, "body": given}


def start(client: openai.OpenAI, lines: list[Any]) -> str:
    content = "".join(json.dumps(each) + "\n" for each in lines).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    return made.id


def finished(client: openai.OpenAI, batch_id: str) -> int:
    counts = client.batches.retrieve(batch_id).request_counts
    return counts.completed + counts.failed if counts else 0


def goes_on(client: openai.OpenAI, batch_id: str, lines: int, seconds: float = 30.0) -> None:
    """Wait for so many lines to end."""
    goal = finished(client, batch_id) + lines
    wait_for(lambda: finished(client, batch_id) >= goal, seconds, lambda: "it does not go on")


def ends(client: openai.OpenAI, batch_id: str, lines: int, seconds: float = 60.0) -> dict[str, Any]:
    """The answers of a batch that completes, by its lines: each is there once."""
    wait_for(
        lambda: client.batches.retrieve(batch_id).status == "completed",
        seconds,
        lambda: str(client.batches.retrieve(batch_id)),
    )
    batch = client.batches.retrieve(batch_id)
    rows = [
        json.loads(each)
        for file_id in (batch.output_file_id, batch.error_file_id)
        if file_id is not None
        for each in client.files.content(file_id).text.splitlines()
    ]
    made = {row["custom_id"]: row["response"]["body"] for row in rows}
    assert len(rows) == len(made) == lines
    assert batch.request_counts.completed == sum("choices" in body for body in made.values())
    return made


@contextmanager
def connected(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


@contextmanager
def echoes(files: Path) -> Iterator[tuple[Any, str]]:
    """A server in a process of its own, and its URL."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(files)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_every_line_ends_once_over_kills(tmp_path: Path, tokenizer: Any, kills: int) -> None:
    files, draw = tmp_path / "files", random.Random(kills)
    batch_id = ""
    for _ in range(kills):
        with echoes(files) as (process, url), connected(url) as client:
            if not batch_id:
                batch_id = start(client, [line(i, MODEL) for i in range(LINES)])
            goes_on(client, batch_id, draw.randint(20, LINES // 2 // kills))
            process.kill()
    with serving(EchoEngine(tokenizer), files=files) as made, connected(made.url) as client:
        answers = ends(client, batch_id, LINES)
        wrong = {name for name, body in answers.items() if "error" in body}
        assert wrong == {str(i) for i in range(LINES) if i % 50 == 7}
        assert not any((files / "batches").iterdir())


RING = ("--stages", 2, "--device", "cpu", "--device-memory", "8MiB", "--context", 512)


@contextmanager
def served(folder: Path, store: Path) -> Iterator[tuple[Command, openai.OpenAI]]:
    more = ("--port", 0, "--files", folder / "files")
    with headrace(folder, "serve", store, *RING, *more) as command:
        wait_for(
            lambda: "served at" in command.stdout or command.process.poll() is not None,
            120.0,
            lambda: command.stderr,
        )
        url = command.stdout.strip().rpartition(" ")[2]
        assert url.startswith("http://127.0.0.1:"), command.stderr
        with connected(url) as client:
            yield command, client


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_ring_that_is_killed_draws_the_same_tokens(stories: Path, tmp_path: Path) -> None:
    lines = [line(i, "stories.nf4", max_tokens=12, ignore_eos=True) for i in range(60)]
    with served(tmp_path, stories) as (command, client):
        whole = ends(client, start(client, lines), 60)
        batch_id = start(client, lines)
        goes_on(client, batch_id, 10)
        command.kill()
    with served(tmp_path, stories) as (command, client):
        goes_on(client, batch_id, 10)
        command.process.terminate()  # and once more in order
        assert command.wait() == 0, command.stderr
        assert "Traceback" not in command.stderr
    with served(tmp_path, stories) as (_, client):
        resumed = ends(client, batch_id, 60)
    assert {name: body.get("choices") for name, body in resumed.items()} == {
        name: body.get("choices") for name, body in whole.items()
    }


def _serve(files: Path) -> None:
    from commands import STORIES

    engine = EchoEngine(load_tokenizer(STORIES), pace=0.005)
    engine.max_sequences = 10
    with serving(engine, files=files) as made:
        sys.stdout.write(f"{made.url}\n")
        sys.stdout.flush()
        time.sleep(600.0)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
