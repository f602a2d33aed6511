"""A load for a server: when its requests are due, and what is said of their answers."""

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from commands import STORIES
from served import EchoEngine, serving
from typer.testing import CliRunner

from headrace.cluster.bench.serve_load import Load, Sent, arrivals
from headrace.cluster.bench.serve_report import report, run_loads
from headrace.cluster.cli.main import app
from headrace.cluster.tokenizer import load_tokenizer
from headrace.scheduler.errors import HeadraceError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(STORIES)


def test_arrivals_are_the_same_for_a_seed_and_as_many_as_was_said() -> None:
    load = Load(rate=20.0, duration=100.0)
    times = list(arrivals(load))
    assert times == list(arrivals(load)) != list(arrivals(Load(rate=20.0, seed=1, duration=100.0)))
    assert len(times) == pytest.approx(20 * 105, rel=0.1)
    gaps = [b - a for a, b in pairwise(times)]
    assert sum(gap > 1 / 20 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.05)


def test_a_report_counts_what_came_in_its_time() -> None:
    load = Load(rate=1.0, duration=10.0, warmup=5.0, max_ttft_ms=1000, keys=("a", "b"))
    in_time = Sent(0, 6.0, 6.0, [6.5, 7.0, 7.5], 3, 7.5, 200)
    late = Sent(1, 8.0, 8.0, [9.5, 10.0], 2, 10.0, 200)
    refused = Sent(1, 9.0, 9.0, [], 0, 9.01, 429, "queue_full")
    early = Sent(0, 1.0, 1.0, [1.5, 5.5], 2, 5.5, 200)
    found = report(load, [in_time, late, refused, early])
    assert (found.requests, found.answered, found.reasons) == (3, 2, {"queue_full": 1})
    assert found.first is not None and found.first.p50 == pytest.approx(1.0)
    assert found.refused is not None and found.refused.p99 == pytest.approx(0.01)
    assert found.in_time == 0.5
    assert found.tokens_per_second_by_key == (0.4, 0.2)
    assert (found.requests_per_second, found.good_requests_per_second) == (0.3, 0.2)
    assert found.good_tokens_per_second == pytest.approx(0.5)


def test_a_load_over_http(tokenizer: Any, tmp_path: Path) -> None:
    engine = EchoEngine(tokenizer, pace=0.01)
    with serving(engine, max_waiting=4) as served:
        file = tmp_path / "report.json"
        command = ["bench", "serve", served.url, "--rate", "20", "--rate", "0", "--warmup", "0"]
        sizes = ["--duration", "1", "--concurrency", "8", "--prompt", "5", "--new", "5"]
        told = ["--priority", "batch", "--deadline-ms", "9000", "--json", str(file)]
        done = CliRunner().invoke(app, command + sizes + told)
        assert done.exit_code == 0, done.output
        assert "20/s" in done.output and "8 at once" in done.output
    open_loop, closed = json.loads(file.read_text())
    assert open_loop["requests"] == open_loop["answered"] + sum(open_loop["reasons"].values())
    assert open_loop["requests"] == pytest.approx(20, abs=12)
    assert set(closed["reasons"]) <= {"queue_full"}
    assert closed["answered"] > 4
    assert closed["good_tokens_per_second"] > 0
    assert engine.classes[0][0].value == "batch"


def test_loads_that_cannot_be(tokenizer: Any) -> None:
    def run(url: str, **given: Any) -> None:
        asyncio.run(run_loads(url, [Load(rate=1.0, **given)], lambda load: None))

    with pytest.raises(HeadraceError, match=r"no server of ours answers at http://127.0.0.1:9"):
        run("http://127.0.0.1:9")
    with (
        serving(EchoEngine(tokenizer)) as served,
        pytest.raises(HeadraceError, match="sequences have 100 at most"),
    ):
        run(served.url, prompt=60, output=60)
