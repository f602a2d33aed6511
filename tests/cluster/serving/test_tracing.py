"""A ring that serves, recorded over HTTP."""

import json
import socket
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Self

import pytest
from commands import wait_for
from local_engines import engine_of
from served import EchoEngine, Served, serving
from typer.testing import CliRunner

from headrace.cluster.cli.main import app
from headrace.cluster.serving.keys import add_key, load_keys
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.placement import Tier

BODY = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 12, "ignore_eos": True}


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def spans_of(trace: Any) -> dict[str, list[dict[str, Any]]]:
    """By process: "driver", "stage 0", ..."""
    events = trace["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            found.setdefault(names[event["pid"]].split(" on ")[0], []).append(event)
    return found


class Asking(threading.Thread):
    """Has the server busy until the block ends."""

    def __init__(self, served: Served) -> None:
        super().__init__()
        self._served, self._over = served, threading.Event()
        self.statuses: Counter[int] = Counter()

    def run(self) -> None:
        while not self._over.is_set():
            self.statuses[self._served.ask("POST", "/v1/completions", BODY)[0]] += 1

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def test_a_ring_is_recorded_while_it_serves(stories: Path) -> None:
    ring = {"stages": 2, "cyclic": True, "num_pages": 16}
    ring["tier"] = [Tier.NVME, Tier.HOST, Tier.DEVICE] * 4
    with engine_of(stories, ring) as engine, serving(engine) as served, Asking(served):
        status, trace, _ = served.ask("POST", "/trace", {"passes": 7, "seconds": 30})
        assert status == 200
        again = served.ask("POST", "/trace", {"passes": 2})[1]
        assert served.ask("POST", "/trace", {"passes": 0})[1]["error"]["param"] == "passes"
    for told, passes in ((trace, 7), (again, 2)):
        spans = spans_of(told)
        assert set(spans) == {"driver", "stage 0", "stage 1"}
        assert told["otherData"]["headrace"]["notes"] == []
        for stage in ("stage 0", "stage 1"):
            kinds = Counter(each["cat"] for each in spans[stage])
            assert 1 <= kinds["pass"] <= passes
            assert {"visit", "read", "matmul", "attention", "wait for weights"} <= set(kinds)
        # Each pass that the driver waited for is that of both stages, on one clock.
        driver = {each["name"]: each for each in spans["driver"]}
        for stage in ("stage 0", "stage 1"):
            for each in spans[stage]:
                step = each["name"].rpartition(" ")[2]
                outer = driver.get(f"in flight {step}") if each["cat"] == "pass" else None
                if outer is not None:
                    assert outer["ts"] <= each["ts"]
                    assert each["ts"] + each["dur"] <= outer["ts"] + outer["dur"]
    assert not engine._tracing.tracer.on


def test_the_command_writes_a_trace_and_sums_it_up(stories: Path, tmp_path: Path) -> None:
    file, runner = tmp_path / "ring.json", CliRunner()
    with engine_of(stories, {"stages": 2, "num_pages": 16}) as engine, serving(engine) as served:
        command = ["trace", served.url, "-o", str(file)]
        idle = runner.invoke(app, [*command, "--seconds", "0.2"])
        assert "the ring had nothing to do" in str(idle.exception)
        assert list(tmp_path.iterdir()) == []
        with Asking(served):
            found = runner.invoke(app, [*command, "--passes", "5"])
        assert found.exit_code == 0, found.output
        assert "The trace is in" in found.stdout and "5 passes in" in found.stdout
        unnamed = runner.invoke(app, command[:2])
        assert "name the file, too" in str(unnamed.exception)
        (tmp_path / "other").write_text("mine")
        other = runner.invoke(app, [*command[:3], str(tmp_path / "other")])
        assert "is no trace" in str(other.exception)
    assert set(spans_of(json.loads(file.read_text()))) == {"driver", "stage 0", "stage 1"}
    again = runner.invoke(app, ["trace", str(file)])
    assert again.stdout.count("matmul") == 1
    assert "The longest waits" in again.stdout and "wait for link" in again.stdout
    cut = tmp_path / "cut.json"
    cut.write_bytes(file.read_bytes()[:-100])
    assert "was cut off" in str(runner.invoke(app, ["trace", str(cut)]).exception)


def test_an_idle_ring_and_a_client_that_leaves(stories: Path) -> None:
    with engine_of(stories, {"stages": 1}) as engine, serving(engine) as served:
        status, trace, _ = served.ask("POST", "/trace", {"seconds": 0.2})
        assert (status, spans_of(trace)) == (200, {})
        leaving = json.dumps({"seconds": 200}).encode()
        head = f"POST /trace HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(leaving)}\r\n"
        with socket.create_connection(served.address) as client:
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + leaving)
            wait_for(lambda: engine._tracing.tracer.on, 10.0, lambda: "not begun")
            status, answer, headers = served.ask("POST", "/trace", {"seconds": 1})
            assert (status, answer["error"]["code"]) == (409, "trace_running")
            assert int(headers["retry-after"]) > 0
        wait_for(lambda: not engine._tracing.tracer.on, 10.0, lambda: "goes on for nobody")
        assert served.ask("POST", "/trace", {"seconds": 0.1})[0] == 200


def test_keys_of_operators_may(tmp_path: Path, tokenizer: Any) -> None:
    keys = tmp_path / "keys"
    ann, ops = add_key(keys, "ann", None), add_key(keys, "ops", None, operator=True)
    with serving(EchoEngine(tokenizer), api_keys=keys) as served:
        asked = {"seconds": 0.1}
        assert served.ask("POST", "/trace", asked)[0] == 401
        status, answer, _ = served.ask("POST", "/trace", asked, bearer(ann))
        assert (status, answer["error"]["code"]) == (403, "not_operator")
        assert served.ask("POST", "/trace", asked, bearer(ops))[0] == 200


@pytest.mark.parametrize("line", ["operator", ":::::operator", ":2:::operator:"])
def test_a_line_of_an_operator_is_checked(tmp_path: Path, line: str) -> None:
    keys = tmp_path / "keys"
    add_key(keys, "ann", None)
    keys.write_text(keys.read_text().strip() + f":{line}\n")
    with pytest.raises(HeadraceError, match="line 1"):
        load_keys(keys)
