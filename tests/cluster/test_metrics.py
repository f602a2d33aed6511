"""What is noted of requests, and that metrics never stand in a run's way."""

import logging
import socket
import time
from pathlib import Path

import pytest
import ray

from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.launch import running_engine
from headrace.cluster.processes import ray_cluster
from headrace.cluster.recovered import Recovery
from headrace.cluster.telemetry.events import KEPT, EngineEvents
from headrace.cluster.telemetry.ray_sink import Beat
from headrace.scheduler.errors import HeadraceError


def test_times_are_measured_from_when_a_request_came() -> None:
    events = EngineEvents()
    events.added(7, 12, "batch", arrived=time.monotonic() - 5.0)
    events.committed({7: 1})
    events.committed({7: 4})
    events.ended(7, "stop")
    seen = events.take()
    assert seen.first_token.values == [pytest.approx(5.0, abs=0.5)]
    assert len(seen.inter_token.values) == 1
    assert seen.end_to_end.values == [pytest.approx(5.0, abs=0.5)]
    assert (events.admitted, events.ended_by) == ({"batch": 1}, {"stop": 1})
    assert events.prompt_tokens == 12
    assert events.take().first_token.values == []


def test_a_request_that_was_given_up_is_counted_once_and_not_timed() -> None:
    events = EngineEvents()
    events.added(1, 3, "interactive")
    events.ended(1, "abort")
    events.committed({1: 1})  # by a pass that was under way
    events.ended(1, "stop")
    assert events.ended_by == {"abort": 1}
    seen = events.take()
    assert not seen.first_token.values and not seen.end_to_end.values


def test_of_many_times_some_are_kept_evenly() -> None:
    events = EngineEvents()
    now = time.monotonic()
    for request in range(50 * KEPT):
        events.added(request, 1, "interactive", arrived=now - request)
    events.committed(dict.fromkeys(range(50 * KEPT), 1))
    kept = sorted(events.take().first_token.values)
    assert len(kept) == KEPT
    assert 15 * KEPT < kept[KEPT // 2] < 35 * KEPT


def test_each_recovery_counts_once() -> None:
    events = EngineEvents()
    events.recovered(Recovery("both died", (0, 1), 1, {"starting": 0.5, "loading": 2.0}))
    events.recovered(Recovery("a link was cut", (), 1, {"connecting": 1.0}))
    moved = Recovery("a node is gone", (), 1, {"waiting for a place": 60.0}, replanned=2)
    events.recovered(moved)
    assert events.recoveries == {"replaced": 1, "reconnected": 1, "replanned": 1}
    assert events.replaced_stages == {0: 1, 1: 1}
    assert sum(events.recovery_seconds.values()) == 63.5
    assert "planned anew for 2 stages" in str(moved)


def test_a_failure_ends_metrics_with_a_warning_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise OSError("the agent is gone")

    with caplog.at_level(logging.WARNING), Beat(fail, seconds=0.01) as beat:
        time.sleep(0.2)
        beat.close()
    assert len(calls) == 1
    assert "no metrics from here on" in caplog.text


def test_a_metrics_port_that_is_taken_is_refused_before_ray_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = f"--metrics-port {port} .* in use"
        with pytest.raises(HeadraceError, match=told), ray_cluster(1, None, port):
            pass
    assert not ray.is_initialized()


def test_a_metrics_port_is_for_a_cluster_of_the_runs_own(stories: Path) -> None:
    options = EngineOptions(stories, address="127.0.0.1:6379", metrics_port=8080)
    told = "ray start --metrics-export-port"
    with pytest.raises(HeadraceError, match=told), running_engine(options):
        pass
