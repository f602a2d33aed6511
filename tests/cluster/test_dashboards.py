"""Every panel and rule that we ship, asked of a real Prometheus that watches a real ring and its server."""

import math
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from adapters import stories_adapters
from commands import STORIES, wait_for
from prometheus import ABSENT, SHIPPED, Prometheus, free_port, installed, prometheus
from served import Served, serving

from headrace.cluster.engine import Engine
from headrace.cluster.keyword_options import engine_options
from headrace.cluster.launch import running_engine
from headrace.cluster.processes import ray_cluster
from headrace.cluster.recovered import Recovery
from headrace.cluster.serving.shadow.options import ShadowOptions
from headrace.cluster.telemetry import table
from headrace.cluster.telemetry.dashboards import DASHBOARDS, GRAFANA, text_of
from headrace.cluster.telemetry.table import Kind
from headrace.scheduler.errors import HeadraceError

PANELS = [panel for dashboard in DASHBOARDS.values() for panel in dashboard.panels]
RULES = [
    rule
    for name in ("rules.yml", "alerts.yml")
    for group in yaml.safe_load((SHIPPED / name).read_text())["groups"]
    for rule in group["rules"]
]
QUERIES = [query.expr for panel in PANELS for query in panel.queries]

NOT_HERE = {
    table.KV_DRIVE_WEAR: "few drives tell their wear, and only with smartctl and its rights",
}
"""What a run on this machine need not show, and why."""

NO_EXPERTS = "Experts found on the device"
"""A panel that divides 0 by 0: the bundled model is no mixture."""

needs_prometheus = pytest.mark.skipif(not installed(), reason=ABSENT)


def names_in(expr: str) -> set[str]:
    """Metrics of ours, without the suffixes of a histogram's series."""
    found = re.findall(r"\b(?:ray_)?headrace_\w+", expr)
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in found}


def test_panels_and_rules_name_metrics_of_the_table_alone() -> None:
    known = {name for spec in table.ALL for name in spec.exposed}
    variables = [str(v) for dashboard in DASHBOARDS.values() for v in dashboard.variables]
    exprs = [*QUERIES, *variables, *(rule["expr"] for rule in RULES)]
    assert set().union(*map(names_in, exprs)) <= known
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    used = chain.from_iterable(re.findall(r"headrace:\w+:\w+", rule["expr"]) for rule in RULES)
    assert set(used) <= recorded


def test_every_metric_of_ray_is_in_a_panel() -> None:
    shown = set().union(*map(names_in, QUERIES))
    assert [spec.name for spec in table.ALL if shown.isdisjoint(spec.exposed)] == []


def test_the_files_of_grafana_are_those_that_the_code_makes() -> None:
    for name, dashboard in DASHBOARDS.items():
        assert (GRAFANA / name).read_text() == text_of(dashboard), (
            "run python -m headrace.cluster.telemetry.dashboards"
        )


@needs_prometheus
def test_promtool_accepts_the_configuration_and_its_rules() -> None:
    command = ["promtool", "check", "config", str(SHIPPED / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "7 rules found" in done.stdout


@needs_prometheus
def test_alerts_fire_when_they_should() -> None:
    cases = Path(__file__).parents[1] / "alerts.yml"
    command = ["promtool", "test", "rules", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tested = {rule["alert"] for rule in RULES if "alert" in rule}
    assert {name for name in tested if name not in cases.read_text()} == {"HeadraceRecovered"}


@dataclass(frozen=True)
class Watched:
    engine: Engine
    server: Served
    prometheus: Prometheus
    labels: dict[str, str]


@pytest.fixture(scope="module")
def watched(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Two stages that stream from NVMe and host RAM, with KV pages in all tiers and an adapter, after some requests."""
    folder, port = tmp_path_factory.mktemp("watched"), free_port()
    adapters = stories_adapters(folder, 1)
    options = engine_options(
        stories,
        {
            "stages": 2,
            "device": "cpu",
            "device_memory": "8MiB",
            "host_memory": "38MiB",
            "adapters": adapters,
            "adapter_host_memory": "2MiB",
            "kv_host_memory": "2MiB",
            "kv_directory": str(folder / "kv"),
            "kv_disk": "64MiB",
            "kv_daily_writes": "1GB",
            "context": 192,
            "ngram_speculation": 2,
            "metrics_port": port,
        },
    )
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        engine = stack.enter_context(running_engine(options))
        shadow = ShadowOptions(stories, STORIES, context=192, sample=1.0, memory=256 << 20)
        server = stack.enter_context(serving(engine, max_waiting=3, shadow=shadow))
        address = f"{server.address[0]}:{server.address[1]}"
        targets = {"headrace-metrics-port": f"127.0.0.1:{port}", "headrace-serve": address}
        made = stack.enter_context(prometheus(folder, targets))
        wait_for(
            lambda: _first_labels(made) != {} and made.ask("headrace_output_tokens_total") != {},
            60.0,
            lambda: str(made.get("targets")),
        )
        # A rate knows nothing of what happened before a series' first sample, and Ray makes a series
        # when there is something to count.
        assert server.ask("POST", "/v1/completions", _body())[0] == 200
        wait_for(
            lambda: made.ask("ray_headrace_end_to_end_seconds_count") != {},
            60.0,
            lambda: str(made.get("targets")),
        )
        _ask(server)
        engine.events.recovered(Recovery("", (1,), 1, {"detect": 0.1, "load": 0.4}))
        wait_for(
            lambda: (
                made.ask("max(ray_headrace_recoveries_total)") == {(): 1.0}
                and made.ask("ray_headrace_time_to_first_token_seconds_count == 5") != {}
                and made.one("ray_headrace_output_tokens_total") == engine.stats.output_tokens
                and made.one("headrace_shadow_sequences_total") == 4
            ),
            120.0,
            lambda: str(made.get("targets")),
        )
        time.sleep(2.0)  # for what stages tell, and for rules
        yield Watched(engine, server, made, _first_labels(made))


def _first_labels(made: Prometheus) -> dict[str, str]:
    found = made.get("query", query="ray_headrace_passes_total")["result"]
    return dict(found[0]["metric"]) if found else {}


def _body(**given: Any) -> dict[str, Any]:
    prompt = "One day, " * 30  # more than a page, which is found again
    always = {"temperature": 0, "logit_bias": {"5": 100}}  # easily guessed
    return {"prompt": prompt, "max_tokens": 20, "ignore_eos": True, **always, **given}


def _ask(server: Served) -> None:
    """Answered, refused for its time, and more than may wait."""
    timed = {"deadline_ms": 100_000, "max_ttft_ms": 90_000}
    for given in (timed, {"n": 2}, {"adapter": "adapter-0", "max_tokens": 1}):
        assert server.ask("POST", "/v1/completions", _body(**given))[0] == 200
    assert server.ask("POST", "/v1/completions", _body(deadline_ms=1))[0] in (429, 504)


def filled(expr: str, labels: dict[str, str]) -> str:
    """A panel's query as Grafana would ask it."""
    for name, value in (
        ("$SessionName", labels["SessionName"]),
        ("$ring", labels["ring"]),
        ("$stage", "0|1"),
        ("$window", "2m"),
    ):
        expr = expr.replace(name, value)
    assert "$" not in expr
    return expr


@needs_prometheus
@pytest.mark.timeout(300)
def test_a_real_run_fills_every_panel(watched: Watched) -> None:
    exempt = {name for spec in NOT_HERE for name in spec.exposed}
    empty = []
    for panel in PANELS:
        for query in panel.queries:
            if names_in(query.expr) & exempt:
                continue
            values = watched.prometheus.ask(filled(query.expr, watched.labels)).values()
            numbers = [value for value in values if math.isfinite(value)]
            if not values or (not numbers and panel.title != NO_EXPERTS):
                empty.append((panel.title, query.expr))
    assert empty == []


@needs_prometheus
def test_a_real_run_makes_every_metric(watched: Watched) -> None:
    missing = []
    for spec in table.ALL:
        for name in spec.exposed:
            if spec not in NOT_HERE:
                series = f"{name}_bucket" if spec.kind is Kind.HISTOGRAM else name
                found = watched.prometheus.get("query", query=series)["result"]
                if not found or not {*spec.labels} <= found[0]["metric"].keys():
                    missing.append(series)
    assert missing == []


@needs_prometheus
def test_rules_work_and_the_alert_of_a_recovery_fires(watched: Watched) -> None:
    def rules() -> list[dict[str, Any]]:
        groups = watched.prometheus.get("rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    assert len(rules()) == len(RULES)
    wait_for(lambda: all(r["health"] == "ok" for r in rules()), 20.0, lambda: str(rules()))
    for rule in RULES:
        if "record" in rule:
            assert watched.prometheus.ask(rule["record"]), rule["record"]
    firing = {(a["labels"]["alertname"], a["labels"]["kind"]) for a in _alerts(watched)}
    assert firing == {("HeadraceRecovered", "replaced")}


def _alerts(watched: Watched) -> list[dict[str, Any]]:
    alerts = watched.prometheus.get("alerts")["alerts"]
    return [alert for alert in alerts if alert["state"] == "firing" and "kind" in alert["labels"]]


@needs_prometheus
def test_what_prometheus_has_is_what_the_engine_counted(watched: Watched) -> None:
    stats, one = watched.engine.stats, watched.prometheus.one
    assert one("ray_headrace_output_tokens_total") == stats.output_tokens == 81
    assert one("ray_headrace_passes_total") == stats.passes
    assert one("ray_headrace_busy_seconds_total") == pytest.approx(stats.busy_seconds)
    assert one("ray_headrace_bound_seconds_total") == pytest.approx(stats.bound_seconds)
    for stage, times in enumerate(stats.stages):
        own = f'{{stage="{stage}",part!="idle"}}'
        seconds = one(f"sum(ray_headrace_stage_seconds_total{own})")
        assert seconds == pytest.approx(times.total)
        whole = one(f'sum(ray_headrace_stage_seconds_total{{stage="{stage}"}})')
        assert whole == pytest.approx(stats.busy_seconds, rel=0.1)
        weights = f'{{stage="{stage}",content="weights",tier="%s"}}'
        for tier, nbytes in (("nvme", times.nvme_bytes), ("host", times.host_bytes)):
            assert one(f"ray_headrace_tier_bytes_total{weights % tier}") == nbytes
    assert one("ray_headrace_time_to_first_token_seconds_count") == 5
    assert one('ray_headrace_ended_sequences_total{reason="length"}') == 5
    server = watched.server.metric
    assert server("headrace_output_tokens_total") == stats.output_tokens
    assert one('ray_headrace_recovery_seconds_total{phase="load"}') == 0.4
    assert sum(watched.prometheus.ask("ray_headrace_turned_away_total").values()) == 1
    assert watched.labels["ring"].startswith("stories.nf4-")


@needs_prometheus
def test_a_connection_that_is_there_has_its_own_port(watched: Watched) -> None:
    with pytest.raises(HeadraceError, match="leave it out"), ray_cluster(1, None, 8080):
        pass
