"""In which class a request goes, and by when: over HTTP, before an engine that echoes."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from commands import wait_for
from served import MODEL, EchoEngine, Served, serving

from headrace.cluster.serving.keys import add_key, load_keys
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.request import Priority

BATCH, INTERACTIVE = Priority.BATCH, Priority.INTERACTIVE


@pytest.fixture
def engine(tokenizer: Any) -> Iterator[EchoEngine]:
    made = EchoEngine(tokenizer)
    yield made
    made.gate.set()


def ask(served: Served, headers: dict[str, str] | None = None, **given: Any) -> Any:
    body = {"model": MODEL, "prompt": "a b c d e f", "max_tokens": 4, **given}
    return served.ask("POST", "/v1/completions", body, headers)


def test_classes_come_to_the_engine(engine: EchoEngine) -> None:
    with serving(engine) as served:
        for given, expected in (
            ({}, INTERACTIVE),
            ({"priority": "batch"}, BATCH),
            ({"priority": "interactive", "service_tier": "auto"}, INTERACTIVE),
            ({"service_tier": "flex"}, BATCH),
            ({"service_tier": "flex", "priority": "batch"}, BATCH),
            ({"service_tier": "default"}, INTERACTIVE),
            ({"service_tier": "priority"}, INTERACTIVE),
        ):
            assert ask(served, **given)[0] == 200
            assert engine.classes[-1] == (expected, 1)
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any") as client:
            client.completions.create(
                model=MODEL, prompt="a b", max_tokens=1, extra_body={"priority": "batch"}
            )
            assert engine.classes[-1] == (BATCH, 1)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"priority": "urgent"}, "priority"),
        ({"service_tier": "soon"}, "service_tier"),
        ({"service_tier": "flex", "priority": "interactive"}, "give one of them"),
        ({"service_tier": "default", "priority": "batch"}, "give one of them"),
        ({"service_tier": "priority", "priority": "batch"}, "give one of them"),
        ({"max_ttft_ms": 0}, "max_ttft_ms"),
        ({"deadline_ms": 10**12}, "deadline_ms"),
    ],
)
def test_terms_that_are_none(engine: EchoEngine, given: dict[str, Any], why: str) -> None:
    with serving(engine) as served:
        status, answer, _ = ask(served, **given)
        assert status == 400 and why in answer["error"]["message"]


def test_a_header_that_is_no_time(engine: EchoEngine) -> None:
    with serving(engine) as served:
        for wrong in ("soon", "-5", "0", "1.5", "1" * 30, "²"):
            status, answer, _ = ask(served, {"X-Request-Timeout-Ms": wrong})
            assert (status, answer["error"]["param"]) == (400, "X-Request-Timeout-Ms")
        assert ask(served, {"X-Request-Timeout-Ms": " 60000 "})[0] == 200


@pytest.mark.parametrize(
    ("given", "headers", "what"),
    [
        ({"max_ttft_ms": 800}, {}, "a first token"),
        ({"deadline_ms": 800}, {}, "the answer"),
        ({"deadline_ms": 90_000}, {"X-Request-Timeout-Ms": "800"}, "the answer"),
    ],
)
def test_a_request_whose_time_is_over_ends_and_gives_its_pages_back(
    engine: EchoEngine, given: dict[str, int], headers: dict[str, str], what: str
) -> None:
    with serving(engine) as served:
        engine.gate.clear()
        began = time.monotonic()
        status, answer, found = ask(served, headers, **given)
        assert 0.8 <= time.monotonic() - began < 5.0
        assert (status, answer["error"]["code"]) == (504, "deadline_passed")
        assert what in answer["error"]["message"]
        assert found["x-should-retry"] == "false"
        engine.gate.set()
        wait_for(lambda: not engine.has_work, 10.0, lambda: "it goes on")
        assert engine.aborted == [1]
        assert served.metric('headrace_turned_away_total{code="deadline_passed"}') == 1
        assert ask(served)[0] == 200


def test_a_stream_whose_time_is_over_ends_with_an_error(engine: EchoEngine) -> None:
    engine.pace = 0.1
    with serving(engine) as served:
        text = ask(served, max_tokens=9, stream=True, deadline_ms=350)[1]
        events = [event for event in text.split("\n\n") if event.startswith("data: ")]
        assert len(events) > 1
        assert json.loads(events[-1][6:])["error"]["code"] == "deadline_passed"


def test_a_time_that_cannot_be_kept_is_refused_at_once(engine: EchoEngine) -> None:
    engine.pace = 0.1
    with serving(engine) as served:
        assert ask(served, max_ttft_ms=5000)[0] == 200  # nobody knows yet how long a pass takes
        began = time.monotonic()
        status, answer, headers = ask(served, max_ttft_ms=20)
        assert time.monotonic() - began < 0.1
        assert (status, answer["error"]["code"]) == (429, "deadline_unreachable")
        assert "wanted within 0.0" in answer["error"]["message"]
        assert int(headers["retry-after"]) >= 1
        assert ask(served, max_ttft_ms=5000)[0] == 200
    assert engine.aborted == []


def test_a_servers_own_limit_is_for_people(engine: EchoEngine) -> None:
    engine.pace = 0.1
    with serving(engine, max_ttft=0.01) as served:
        assert ask(served, max_ttft_ms=5000)[0] == 200
        assert ask(served)[0] == 429
        assert ask(served, priority="batch")[0] == 200


def test_nobody_keeps_others_out_of_the_line(engine: EchoEngine, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    many, few = add_key(file, "many", None), add_key(file, "few", None)
    with serving(engine, api_keys=file, max_waiting=2) as served:
        engine.gate.clear()

        def send(secret: str, deadline_ms: int = 500, **given: Any) -> int:
            """A request that waits is given up after a moment."""
            told = {"Authorization": f"Bearer {secret}"}
            return int(ask(served, told, deadline_ms=deadline_ms, **given)[0])

        # These stay in the line however slow the machine is.
        threads = [threading.Thread(target=send, args=(many, 60_000)) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
        wait_for(lambda: send(many) == 429, 10.0, lambda: "not full")
        assert send(many, priority="batch") == 504
        assert send(few) == 504
        engine.gate.set()
        for thread in threads:
            thread.join()


def test_weights_of_keys(engine: EchoEngine, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    plain, heavy = add_key(file, "plain", None), add_key(file, "heavy", None, 5)
    both = add_key(file, "both", 2, 3)
    lines = file.read_text().splitlines()
    assert [line.split(":")[2:] for line in lines] == [[], ["", "5"], ["2", "3"]]
    found = [load_keys(file).find(secret) for secret in (plain, heavy, both)]
    known = [(key.limit, key.weight) for key in found if key is not None]
    assert known == [(None, 1), (None, 5), (2, 3)]
    with serving(engine, api_keys=file) as served:
        assert ask(served, {"Authorization": f"Bearer {heavy}"})[0] == 200
    assert engine.classes == [(INTERACTIVE, 5)]
    for wrong in (":", "::", ":2:", ":2:0", "::1000", ":2:3:0", "::::1000000000", ":2:3:4:5:6"):
        file.write_text(lines[0] + wrong)
        with pytest.raises(HeadraceError, match=r"not NAME:SHA256\[:\[REQUESTS\]"):
            load_keys(file)


def test_lines_of_batches_have_the_weight_of_their_key(engine: EchoEngine, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    secrets = {weight: add_key(file, f"of-{weight}", None, weight) for weight in (1, 5)}
    body = {"prompt": [5, 6, 7], "max_tokens": 3}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}
    with serving(engine, api_keys=file, files=tmp_path / "files") as served:
        for weight, secret in secrets.items():
            with openai.OpenAI(base_url=f"{served.url}/v1", api_key=secret) as client:
                given = ("in.jsonl", json.dumps(line).encode())
                client.batches.create(
                    input_file_id=client.files.create(file=given, purpose="batch").id,
                    endpoint="/v1/completions",
                    completion_window="24h",
                )
            wait_for(lambda: engine.classes, 10.0, lambda: "not begun")
            assert engine.classes.pop() == (BATCH, weight)
