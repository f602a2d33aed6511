"""A server's shadow: real processes that compare what the bundled model answered."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import STORIES, wait_for
from prometheus import ABSENT, SHIPPED, installed
from served import EchoEngine, Served, serving, stories_engine
from shadows import Heard, other_stories, shadow_processes

from headrace.cluster.serving.shadow.options import ShadowOptions
from headrace.runtime.evaluation.answers import Answer
from headrace.runtime.evaluation.compare import answer_windows
from headrace.runtime.evaluation.figures import divergence_figures, perplexity
from headrace.runtime.evaluation.measure import measure
from headrace.runtime.sweep.source import open_model
from headrace.runtime.sweep.sweep import Sweep

MEMORY = 256 << 20
GREEDY = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}


@dataclass
class Shadowed:
    server: Served
    heard: Heard

    def ask(self, prompt: str, **how: Any) -> str:
        body = {"prompt": prompt, **GREEDY, **how}
        status, answer, _ = self.server.ask("POST", "/v1/completions", body)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    def compared(self, count: int) -> None:
        """Wait until so many answers have been."""
        self.until("headrace_shadow_sequences_total", count)

    def until(self, name: str, value: float) -> None:
        metric = self.server.metric
        wait_for(
            lambda: metric(name) == value, 120.0, lambda: self.server.ask("GET", "/metrics")[1]
        )


@pytest.fixture(scope="module")
def shadowed(stories: Path) -> Iterator[Shadowed]:
    options = ShadowOptions(stories, STORIES, context=256, sample=1.0, memory=MEMORY)
    with stories_engine(stories) as engine:
        heard = Heard(engine)
        with serving(heard, shadow=options) as server:
            yield Shadowed(server, heard)
    assert shadow_processes() == []


def evaluated(store: Path, heard: Heard) -> tuple[float, float, float, float]:
    """Mean and p99 of the divergence from the bundled checkpoint, top-1 agreement and the ratio of perplexities."""
    answers = [
        Answer((*prompt, *done.token_ids), len(prompt), greedy=False) for prompt, done in heard.said
    ]
    windows = answer_windows(answers, max(len(answer.tokens) for answer in answers))
    options = {"context": windows.context}
    device, dtype = torch.device("cpu"), torch.float32
    with (
        Sweep(open_model(STORIES), device, dtype, **options) as beside,
        Sweep(open_model(store), device, dtype, **options) as own,
    ):
        reference, found = measure([beside, own], windows, lambda *_: None)
    figures = divergence_figures(windows, reference, found)
    ratio = perplexity(windows, found) / perplexity(windows, reference)
    return figures.mean, figures.p99, figures.top1, ratio


def test_metrics_are_what_an_evaluation_of_the_same_answers_finds(
    shadowed: Shadowed, stories: Path
) -> None:
    metric = shadowed.server.metric
    assert shadow_processes() == []  # until there is something to compare
    assert metric("headrace_shadow_max_kld") == 0.1
    for prompt in ("Once upon a time", "The dog", "A girl named Anna had a red ball"):
        shadowed.ask(prompt)
    shadowed.ask("In the forest", temperature=1, seed=4)
    shadowed.ask("In the forest", logit_bias={"5": 2})
    shadowed.compared(5)
    mean, p99, top1, ratio = evaluated(stories, shadowed.heard)
    assert metric('headrace_shadow_kld{figure="mean"}') == pytest.approx(mean, rel=1e-3)
    assert metric('headrace_shadow_kld{figure="p99"}') == pytest.approx(p99, rel=1e-3)
    assert metric('headrace_shadow_agreement{source="models"}') == pytest.approx(top1)
    assert metric("headrace_shadow_perplexity_ratio") == pytest.approx(ratio, rel=1e-3)
    assert metric("headrace_shadow_kld_nats_total") == pytest.approx(mean * 300, rel=1e-3)
    # NF4 answers otherwise than its reference, but as it is; neither drawn tokens nor biased ones count.
    assert metric("headrace_shadow_greedy_tokens_total") == 180
    assert metric('headrace_shadow_strayed_tokens_total{source="own"}') == 0
    assert metric('headrace_shadow_agreement{source="own"}') == 1
    assert 0.5 < metric('headrace_shadow_agreement{source="reference"}') < 1
    told = shadowed.server.ask("GET", "/ring")[1]["shadow"]
    assert told["sequences"] == told["last"]["sequences"] == 5
    assert told["last"]["kld_mean"] == metric('headrace_shadow_kld{figure="mean"}')


@pytest.mark.slow
def test_a_shadow_that_dies_harms_no_answer_and_comes_back(shadowed: Shadowed) -> None:
    prompt = "The cat sat"
    expected = shadowed.ask(prompt)
    shadowed.until("headrace_shadow_waiting_tokens", 0)
    before, (victim,) = (
        shadowed.server.metric("headrace_shadow_sequences_total"),
        shadow_processes(),
    )
    assert victim.nice() == 19
    victim.kill()
    assert shadowed.ask(prompt) == expected
    shadowed.compared(int(before) + 1)
    assert shadowed.server.metric("headrace_shadow_restarts_total") == 1
    assert shadowed.server.metric('headrace_shadow_dropped_total{reason="failed"}') == 0
    (again,) = shadow_processes()
    assert again.pid != victim.pid


def test_without_the_option_nothing_is_sampled(stories: Path) -> None:
    with stories_engine(stories) as engine, serving(engine) as server:
        body = {"prompt": "Once", **GREEDY}
        assert server.ask("POST", "/v1/completions", body)[0] == 200
        assert "shadow" not in server.ask("GET", "/metrics")[1]
        assert server.ask("GET", "/ring")[1]["shadow"] is None


def test_a_thousand_requests_take_no_more_memory_than_was_given(
    tokenizer: Any, stories: Path
) -> None:
    options = ShadowOptions(stories, STORIES, context=100, sample=1.0, tokens=500, memory=MEMORY)
    with serving(EchoEngine(tokenizer), shadow=options, max_waiting=1000) as server:
        body = {"prompt": ["Once upon a time there was a dog"] * 250, "max_tokens": 5}
        for _ in range(4):
            assert server.ask("POST", "/v1/completions", body)[0] == 200
        metric = server.metric
        assert 0 < metric("headrace_shadow_waiting_tokens") <= 500
        waiting = metric("headrace_shadow_waiting_tokens") // (5 + 8)
        assert metric('headrace_shadow_dropped_total{reason="full"}') >= 1000 - waiting - 40


@pytest.fixture(scope="module")
def far(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, float]]:
    """Metrics of a server beside a reference with other weights."""
    reference = other_stories(tmp_path_factory.mktemp("other"))
    options = ShadowOptions(stories, reference, context=256, sample=1.0, memory=MEMORY)
    with stories_engine(stories) as engine, serving(engine, shadow=options) as server:
        made = Shadowed(server, Heard(engine))
        for prompt in ("Once upon a time", "The dog"):
            made.ask(prompt)
        made.compared(2)
        lines = server.ask("GET", "/metrics")[1].splitlines()
    told = [line.rpartition(" ") for line in lines if line.startswith("headrace_shadow")]
    yield {name: float(value) for name, _, value in told}


def test_a_reference_with_other_weights_is_far_away(far: dict[str, float]) -> None:
    assert far['headrace_shadow_kld{figure="mean"}'] > 10 * far["headrace_shadow_max_kld"]
    assert far['headrace_shadow_agreement{source="own"}'] == 1
    assert far['headrace_shadow_agreement{source="reference"}'] < 0.2


@pytest.mark.skipif(not installed(), reason=ABSENT)
def test_its_alert_fires_and_that_of_a_ring_that_computes_wrongly_does_not(
    far: dict[str, float], tmp_path: Path
) -> None:
    series = [
        {"series": name, "values": f"{0 if '_total' in name else value}x5 {value}x30"}
        for name, value in far.items()
    ]
    firing = {
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": "20m",
        "exp_samples": [{"labels": '{alertname="HeadraceShadowDivergence"}', "value": 1}],
    }
    case = {"interval": "1m", "input_series": series, "promql_expr_test": [firing]}
    file = tmp_path / "case.yml"
    rules = [str(SHIPPED / name) for name in ("rules.yml", "alerts.yml")]
    file.write_text(yaml.safe_dump({"rule_files": rules, "tests": [case]}))
    command = ["promtool", "test", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
