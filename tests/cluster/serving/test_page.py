"""The page at `/` and what it asks for, over HTTP: what anybody gets, and what only a key opens."""

import queue
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import wait_for
from local_engines import engine_of
from served import MODEL, EchoEngine, Served, serving

from headrace.cluster.job_report import Work
from headrace.cluster.serving.keys import add_key
from headrace.cluster.serving.page import PATHS
from headrace.cluster.serving.recent_work import RecentWork
from headrace.scheduler.placement import Tier

CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me a story."}],
}


@contextmanager
def held(engine: EchoEngine) -> Iterator[None]:
    """No pass goes on until the gate is opened, at the end at the latest."""
    engine.gate.clear()
    try:
        yield
    finally:
        engine.gate.set()


def ask_beside(
    served: Served, body: dict[str, Any], headers: dict[str, str] | None = None
) -> "queue.Queue[int]":
    """Ask in a thread; the status comes with the answer."""
    statuses: queue.Queue[int] = queue.Queue()

    def ask() -> None:
        statuses.put(served.ask("POST", "/v1/chat/completions", body, headers)[0])

    threading.Thread(target=ask, daemon=True).start()
    return statuses


@pytest.fixture(scope="module")
def echoes(tokenizer: Any) -> Iterator[Served]:
    with serving(EchoEngine(tokenizer)) as made:
        yield made


def test_the_page_needs_nothing_from_elsewhere(echoes: Served) -> None:
    kinds = {}
    for path in PATHS:
        status, text, headers = echoes.ask("GET", path)
        assert status == 200
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        kinds[path.rpartition(".")[2]] = headers["content-type"].partition(";")[0]
        links = set(re.findall(r"https?://[^\s\"'`]+", text))
        assert links <= {"http://www.w3.org/2000/svg"}, path
    assert kinds == {
        "/": "text/html",
        "css": "text/css",
        "js": "text/javascript",
        "svg": "image/svg+xml",
    }


def test_all_that_the_page_names_is_served(echoes: Served) -> None:
    html = echoes.ask("GET", "/")[1]
    named = set(re.findall(r'(?:src|href)="([^"#]+)"', html))
    for script in ("chat.js", "ring.js", "client.js"):
        text = echoes.ask("GET", f"/page/{script}")[1]
        named |= {f"page/{name}" for name in re.findall(r'from "\./([^"]+)"', text)}
    assert {f"/{name}" for name in named} | {"/"} == PATHS
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", html)


@pytest.mark.parametrize("path", ["/page", "/page/", "/page/__init__.py", "/page/../page.css"])
def test_nothing_else_lies_there(echoes: Served, path: str) -> None:
    status, answer, _ = echoes.ask("GET", path)
    assert (status, answer["error"]["code"]) == (404, "unknown_url")


def test_only_to_read(echoes: Served) -> None:
    assert echoes.ask("HEAD", "/")[:2] == (200, "")
    for path in ("/", "/ring"):
        assert echoes.ask("POST", path, {})[1]["error"]["code"] == "method_not_allowed"
    assert echoes.ask("GET", "/", headers={"Host": "evil.example"})[0] == 403


def test_the_page_comes_without_a_key_and_tells_nothing(tmp_path: Path, tokenizer: Any) -> None:
    keys = tmp_path / "keys"
    secret = add_key(keys, "ann", 1)
    with serving(EchoEngine(tokenizer), api_keys=keys, model_name="secret-7b") as served:
        for path in PATHS:
            status, text, _ = served.ask("GET", path)
            assert status == 200
            assert "secret-7b" not in text
        for path in ("/ring", "/v1/models", "/page/none.js"):
            assert served.ask("GET", path)[1]["error"]["code"] == "missing_api_key"
        bearer = {"Authorization": f"Bearer {secret}"}
        assert served.ask("GET", "/ring", headers=bearer)[0] == 200


def test_looking_at_the_ring_takes_no_request_of_a_key(tmp_path: Path, tokenizer: Any) -> None:
    """A page that is open asks for it all the time."""
    keys, engine = tmp_path / "keys", EchoEngine(tokenizer)
    bearer = {"Authorization": f"Bearer {add_key(keys, 'ann', 1)}"}
    with serving(engine, api_keys=keys) as served, held(engine):
        answers = ask_beside(served, CHAT, bearer)
        wait_for(lambda: engine.has_work, 10.0, lambda: "not begun")
        assert served.ask("GET", "/v1/models", headers=bearer)[0] == 429
        assert served.ask("GET", "/ring", headers=bearer)[0] == 200
        engine.gate.set()
        assert answers.get(timeout=10.0) == 200


def test_the_ring_before_and_after_passes(stories: Path) -> None:
    ring = {"stages": 2, "cyclic": True, "num_pages": 16}
    ring["tier"] = [Tier.NVME, Tier.HOST, Tier.DEVICE] * 4
    with engine_of(stories, ring) as engine, serving(engine) as served:
        before = served.ask("GET", "/ring")[1]
        assert (before["passes"], before["seconds_since_pass"]) == (None, None)
        assert before["kv"]["device"]["free"] == before["kv"]["device"]["total"] == 16
        layers = before["stages"][1]["layers"]
        assert [each["layer"] for each in layers] == [1, 3, 5, 7, 9, 11]
        assert [each["tier"] for each in layers[:3]] == ["host", "nvme", "device"]
        assert before["stages"][1]["times"] is None

        body = {**CHAT, "max_tokens": 20, "ignore_eos": True}
        assert served.ask("POST", "/v1/chat/completions", body)[0] == 200
        after = served.ask("GET", "/ring")[1]
    passes = after["passes"]
    assert (
        0 < passes["count"] <= 20
    )  # of the newest seconds, in which there may not have been time for all
    rate = passes["count"] / passes["busy_seconds"]
    assert passes["tokens_per_second"] == pytest.approx(rate)
    share = passes["bound_seconds"] / passes["pass_seconds"]
    assert passes["share_of_bound"] == pytest.approx(share)
    assert after["seconds_since_pass"] >= 0
    assert after["sequences"]["interactive"] == {"running": 0, "waiting": 0}
    for stage in after["stages"]:
        times = stage["times"]
        names = ("computing", "waiting_for_weights", "waiting_for_link", "waiting_for_kv")
        shares = [times[name] for name in (*names, "between_passes")]
        assert sum(shares) == pytest.approx(1.0)
        assert min(shares) >= 0
        assert times["nvme_bytes_per_second"] > 0
        assert times["host_bytes_per_second"] > 0
        assert times["experts_on_device"] is None


def test_the_ring_tells_people_and_batches_apart(tokenizer: Any) -> None:
    engine = EchoEngine(tokenizer, max_running=3)
    with serving(engine) as served, held(engine):
        answers = [ask_beside(served, {**CHAT, "n": 2})]
        wait_for(lambda: len(engine.classes) == 2, 10.0, lambda: "not begun")
        engine.gate.set()
        assert answers[0].get(timeout=10.0) == 200
        engine.gate.clear()
        answers = [ask_beside(served, {**CHAT, "n": 2, "priority": "batch"})]

        def counts() -> Any:
            return served.ask("GET", "/ring")[1]["sequences"]

        wait_for(lambda: counts()["batch"]["running"] == 2, 10.0, lambda: str(counts()))
        assert counts() == {
            "interactive": {"running": 0, "waiting": 0},
            "batch": {"running": 2, "waiting": 0},
            "max_running": 3,
        }
        engine.gate.set()
        assert answers[0].get(timeout=10.0) == 200


def test_spans_are_of_the_last_seconds() -> None:
    work = [Work(n, 0, 10 * n, float(n), n / 2, ()) for n in range(40)]
    recent = RecentWork(work[0])
    for second in range(1, 20):
        recent.note(float(second), work[second])
    assert recent.span is not None
    assert (recent.span.work.passes, recent.span.work.output_tokens) == (5, 50)
    recent.note(500.0, work[20])  # long after: that pass alone, however long it took
    assert recent.span.work.passes == 1
    for i in range(21, 40):
        recent.note(500.0 + i / 100, work[i])
    assert recent.span.work.passes == 20
    assert recent.span.ended == 500.39
