"""`headrace serve` as users run it: two stages on Ray, signals and a stage that dies."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from commands import Command, headrace, wait_for

pytestmark = pytest.mark.slow

RING = ("--stages", 2, "--device", "cpu", "--device-memory", "8MiB", "--context", 512)
LONG = {"ignore_eos": True}


@contextmanager
def serve(folder: Path, store: Path, *more: object) -> Iterator[tuple[Command, openai.OpenAI]]:
    with headrace(folder, "serve", store, *RING, "--port", 0, *more) as command:
        wait_for(
            lambda: "served at" in command.stdout or command.process.poll() is not None,
            120.0,
            lambda: command.stderr,
        )
        url = command.stdout.partition(" served at ")[2].split()[0]
        assert url.startswith("http://127.0.0.1:"), command.stderr
        with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            yield command, client


class Reading(threading.Thread):
    """Reads a stream to its end, whatever that is."""

    def __init__(self, client: openai.OpenAI, max_tokens: int = 100) -> None:
        super().__init__()
        self._client, self._max_tokens = client, max_tokens
        self.begun = threading.Event()
        self.reasons: list[str] = []
        self.error: openai.APIError | None = None

    def run(self) -> None:
        try:
            chunks = self._client.completions.create(
                model="stories.nf4",
                prompt="Once upon a time",
                max_tokens=self._max_tokens,
                stream=True,
                extra_body=LONG,
            )
            for chunk in chunks:
                self.begun.set()
                self.reasons += filter(None, [chunk.choices[0].finish_reason])
        except openai.APIError as error:
            self.error = error


def test_a_signal_lets_streams_finish(stories: Path, tmp_path: Path) -> None:
    with serve(tmp_path, stories) as (command, client):
        talk = client.chat.completions.create(
            model="stories.nf4", messages=[{"role": "user", "content": "Hello"}], max_tokens=8
        )
        assert talk.choices[0].message.content
        reading = Reading(client)
        reading.start()
        assert reading.begun.wait(30.0)
        command.process.send_signal(signal.SIGTERM)
        reading.join(60.0)
        assert (reading.reasons, reading.error) == (["length"], None)
        assert command.wait() == 0
        wait_for(lambda: not command.processes(), 60.0, lambda: str(command.processes()))
        assert "1 requests may finish" in command.stderr
        assert "Traceback" not in command.stderr


def test_ctrl_c_ends_a_server_when_the_grace_is_over(stories: Path, tmp_path: Path) -> None:
    with serve(tmp_path, stories, "--grace", 0.5) as (command, client):
        reading = Reading(client, max_tokens=500)
        reading.start()
        assert reading.begun.wait(30.0)
        command.interrupt()
        reading.join(60.0)
        assert "stopping" in str(reading.error)
        assert command.wait() == 0
        assert "Traceback" not in command.stderr


def test_a_stream_stays_open_while_a_stage_is_replaced(stories: Path, tmp_path: Path) -> None:
    with serve(tmp_path, stories) as (command, client):
        reading = Reading(client, max_tokens=500)
        reading.start()
        assert reading.begun.wait(30.0)
        command.stage(1).kill()
        reading.join(120.0)
        assert (reading.reasons, reading.error) == (["length"], None)
        assert "stages 1 replaced" in command.stderr
        assert "Traceback" not in command.stderr


def test_grpc_beside_http(stories: Path, tmp_path: Path) -> None:
    with serve(tmp_path, stories, "--grpc-port", 0) as (command, client):
        said = command.stdout.strip()
        address = said.rpartition(" ")[2]
        given = {"max_tokens": 12, "seed": 3}
        want = client.completions.create(model="stories.nf4", prompt="Once", **given)
        at = ("--address", address)
        asked = ("generate", "Once", "--max-tokens", 12, "--seed", 3)
        with headrace(tmp_path, "client", *asked, *at) as other:
            assert other.wait() == 0, other.stderr
        assert other.stdout == want.choices[0].text + "\n"
        with headrace(tmp_path, "client", "generate", "Once", "--max-tokens", 500, *at) as left:
            wait_for(lambda: bool(left.stdout), 30.0, lambda: left.stderr)
            left.interrupt()
            assert left.wait() == 130
        with headrace(tmp_path, "client", "loads", "--json", *at) as looking:
            assert looking.wait() == 0
        assert json.loads(looking.stdout)["running_sequences"] == 0
        command.process.send_signal(signal.SIGTERM)
        assert command.wait() == 0
        assert "Traceback" not in command.stderr + left.stderr
