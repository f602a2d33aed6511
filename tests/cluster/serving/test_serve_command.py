"""`headrace serve` as users run it: two stages on Ray, signals and a stage that dies."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from commands import STORIES, Command, headrace, wait_for
from prometheus import free_port

from headrace.cluster.top.door import Door
from headrace.cluster.top.from_metrics import MetricsSource
from headrace.cluster.top.from_server import ServerSource
from headrace.cluster.top.nodes import nodes_here
from headrace.cluster.top.watch import look_once
from headrace.cluster.trace_summary import summarize

RING = ("--stages", 2, "--device", "cpu", "--device-memory", "8MiB", "--context", 512)
ALONE = ("--stages", 1, "--device-memory", "64MiB")
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


def test_a_server_from_its_start_to_its_end(stories: Path, tmp_path: Path) -> None:
    with serve(tmp_path, stories, *ALONE) as (command, client):
        talk = client.chat.completions.create(
            model="stories.nf4", messages=[{"role": "user", "content": "Hello"}], max_tokens=8
        )
        assert talk.choices[0].message.content
        command.process.send_signal(signal.SIGTERM)
        assert command.wait() == 0
        wait_for(lambda: not command.processes(), 60.0, lambda: str(command.processes()))
        assert "Traceback" not in command.stderr


@pytest.mark.slow
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


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_whoever_watches_sees_a_stage_replaced(stories: Path, tmp_path: Path) -> None:
    """In `top`, by the server and by what nodes show, and in a trace that was begun before."""
    file, rings = tmp_path / "t.json", ("--metrics-port", free_port())
    with serve(tmp_path, stories, *rings) as (command, client):
        url = str(client.base_url).removesuffix("/v1/")
        source, readings = ServerSource(Door(url)), f"http://127.0.0.1:{rings[1]}"
        agents = MetricsSource("a node", [readings])
        assert f":{rings[1]}" in " ".join(nodes_here())
        reading = Reading(client, max_tokens=450)
        reading.start()
        assert reading.begun.wait(30.0)
        pieces = source.door.post("/trace", {"seconds": 90, "passes": 400}, 200.0)
        recording = threading.Thread(target=lambda: file.write_bytes(b"".join(pieces)))
        recording.start()
        time.sleep(2.0)  # some hundred passes, of which the first begins it
        (before,) = source.look()
        victim = command.stage(1)
        assert [each.state for each in before.stages] == ["serving", "serving"]
        assert before.stages[1].pid == victim.pid
        victim.kill()
        wait_for(lambda: bool(source.look()[0].troubled), 30.0, lambda: str(source.look()))
        wait_for(lambda: source.look()[0].recoveries == 1, 90.0, lambda: command.stderr)
        recording.join(150.0)
        (after,) = source.look()
        assert after.stages[0].pid == before.stages[0].pid
        assert after.stages[1].pid not in (0, victim.pid)
        assert after.last is not None and after.last.stages == (1,)
        assert "loading" in after.last.phases and "stage 1" in after.last.cause
        (shown,) = look_once(agents)
        assert shown.name == after.name and shown.recoveries == 1
        assert [each.pid for each in shown.stages] == [each.pid for each in after.stages]
        assert [each.state for each in shown.stages] == ["serving", "serving"]
        reading.join(60.0)
    assert reading.error is None
    found = summarize(file)
    assert set(found.nodes) == {"driver", "stage 0", "stage 1"}
    assert {"recovery", "in flight"} <= set(found.spans["driver"])
    assert all("pass" in found.spans[f"stage {stage}"] for stage in (0, 1))
    (note,) = found.notes
    assert "stage 1, whose place another one took" in note


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_shadow_ends_with_its_server_however_that_ends(stories: Path, tmp_path: Path) -> None:
    shadow = ("--shadow", STORIES, "--shadow-sample", "100%", "--shadow-memory", "256MiB")
    for how in ("killed", "told"):
        with serve(tmp_path, stories, *shadow) as (command, client):
            given = {"max_tokens": 20, "temperature": 0, "extra_body": LONG}
            client.completions.create(model="stories.nf4", prompt="Once", **given)
            door = Door(str(client.base_url).removesuffix("/v1/"))
            wait_for(
                lambda door=door: door.get("/ring")["shadow"]["sequences"] == 1,
                120.0,
                lambda command=command: command.stderr,
            )
            assert door.get("/ring")["shadow"]["last"]["agreement"]["own"] == 1
            if how == "killed":
                command.kill()  # which waits until nothing is left
            else:
                command.process.send_signal(signal.SIGTERM)
                assert command.wait() == 0
                wait_for(
                    lambda c=command: not c.processes(), 60.0, lambda c=command: str(c.processes())
                )
                assert "Traceback" not in command.stderr


@pytest.mark.slow
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
