"""Rings that are watched: what is read of servers and metrics, and what a terminal shows."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from local_engines import engine_of
from rich.console import Console
from served import EchoEngine, Served, serving
from typer.testing import CliRunner

from headrace.cluster.cli.main import app, main
from headrace.cluster.serving.keys import add_key
from headrace.cluster.top.counters import Readings, Sample, parse
from headrace.cluster.top.door import Door
from headrace.cluster.top.from_metrics import MetricsSource
from headrace.cluster.top.from_server import ServerSource
from headrace.cluster.top.render import render
from headrace.cluster.top.view import RecoveryView, RingView, StageView
from headrace.cluster.top.watch import as_json, look_once, watch
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.placement import Tier

BODY = {"model": "stories", "prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def served(stories: Path) -> Iterator[Served]:
    """Two stages that have had something to do."""
    ring = {"stages": 2, "cyclic": True, "num_pages": 16}
    ring["tier"] = [Tier.NVME, Tier.HOST, Tier.DEVICE] * 4
    with engine_of(stories, ring) as engine, serving(engine) as made:
        assert made.ask("POST", "/v1/completions", BODY)[0] == 200
        yield made


def told(*arguments: str) -> str:
    """What a command that fails says."""
    runner = CliRunner()
    found = runner.invoke(app, list(arguments))
    assert isinstance(found.exception, HeadraceError), found.output
    return str(found.exception)


def lines_of(rings: list[RingView], width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(render(rings, "http://127.0.0.1:8000", width))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


def test_a_server_is_watched(served: Served) -> None:
    (ring,) = ServerSource(Door(served.url)).look()
    assert ring.tokens_per_second and ring.share_of_bound and ring.pass_seconds
    assert (ring.running, ring.waiting, ring.recoveries) == (0, 0, 0)
    for stage in ring.stages:
        assert stage.parts is not None
        assert sum(stage.parts.values()) == pytest.approx(1.0)
        assert stage.rates["NVMe"] > 0 and stage.rates["host"] > 0
    found = CliRunner().invoke(app, ["top", served.url])  # which is no terminal
    assert found.exit_code == 0
    assert "share of the bound" in found.stdout and "no pass for" in found.stdout
    found = CliRunner().invoke(app, ["top", f"{served.url}/v1/", "--json"])
    (same,) = json.loads(found.stdout)["rings"]
    assert same["tokens_per_second"] == ring.tokens_per_second
    assert len(same["stages"]) == 2 and 0 <= same["bubble"] <= 1


def test_doors_that_do_not_open(served: Served, tmp_path: Path, tokenizer: Any) -> None:
    assert "no server answers at http://127.0.0.1:1: Connection refused" in told(
        "top", "http://127.0.0.1:1"
    )
    assert "is no URL" in told("top", "127.0.0.1:8000")
    assert "not both" in told("top", served.url, "--address", "auto")
    assert "/v1/completions has no /ring" in told("top", f"{served.url}/v1/completions")
    assert "cannot be used" in told("top", served.url, "--ca-file", str(tmp_path / "none.pem"))
    keys, file = tmp_path / "keys", tmp_path / "key"
    file.write_text(add_key(keys, "ann", None))
    file.chmod(0o600)
    with serving(EchoEngine(tokenizer), api_keys=keys) as closed:
        assert "wants an API key: give --key-file" in told("top", closed.url)
        assert "no operator's" in told(
            "trace", closed.url, "-o", str(tmp_path / "t.json"), "--key-file", str(file)
        )
        arguments = ["top", closed.url, "--key-file", str(file)]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        environment = {"HEADRACE_API_KEY": file.read_text()}
        assert CliRunner().invoke(app, arguments[:2], env=environment).exit_code == 0
    file.chmod(0o644)
    assert "chmod 600" in told("top", closed.url, "--key-file", str(file))


STAGE = StageView(
    0, "10.0.0.1", 4242, "serving", 9.0,
    {"compute": 0.5, "weights": 0.25, "kv": 0.0, "link": 0.15, "idle": 0.1},
    {"NVMe": 2.5e9, "host": 1.25e8, "KV NVMe": 0.0, "KV host": 3.0e6},
)  # fmt: skip
RING = RingView(
    "llama.nf4-3fa0c1",
    (STAGE, replace(STAGE, stage=1, node="10.0.0.2", state="starting", parts=None)),
    running=3, waiting=1, max_running=8, share_of_bound=0.81, bound_by="nvme",
    tokens_per_second=1234.5, pass_seconds=0.25, since_pass=0.1,
    rejected={"queue_full": 3, "deadline_passed": 1},
    pages={"device": {"used": 5, "cached": 2, "free": 9}, "host": {}, "nvme": {"cached": 70}},
    adapter_slots={"used": 3, "cached": 1, "free": 0}, adapters_waiting=2,
    recoveries=1,
    last=RecoveryView((1,), {"breaking off": 0.5, "connecting": 0.25}, 12.0, 3, "it died. Ray says"),
)  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_terminal_shows_all_of_it(width: int) -> None:
    lines = lines_of([RING], width)
    assert max(map(len, lines)) <= width
    text = " ".join(line.strip() for line in lines)
    wanted = ["stage 1 starting", "81%", "1,234", "3 of 8", "weights 25%"]
    wanted += ["4242", "most queue_full", "5 used, 2 cached, 9 free", "70 cached", "bubble 25%"]
    wanted += ["slots: 3 used, 1 cached, 2 adapters wait for one"]
    wanted += ["breaking off 0.5 s, connecting 0.2 s", "3 requests computed again", "it died"]
    if width >= 80:
        assert [each for each in wanted if each not in text] == []
        (bar,) = [line for line in lines if line.startswith("0 ")]
        shares = [bar.count(glyph) for glyph in "█▓░·"]
        assert shares == sorted(shares, reverse=True) and min(shares) > 0
    if width >= 100:
        assert "2.5 GB" in text and "3.0 MB" in text
    assert "Ray says" not in text


class Scripted:
    """A source that shows what it is given, in turn."""

    place, warm_up = "here", 0.0

    def __init__(self, *looks: list[RingView] | BaseException) -> None:
        self._looks = iter(looks)

    def look(self) -> list[RingView]:
        found = next(self._looks)
        if isinstance(found, BaseException):
            raise found
        return found


def test_a_ring_that_goes_away_stays_in_the_picture_until_ctrl_c() -> None:
    screen = io.StringIO()
    console = Console(width=80, height=30, file=screen, force_terminal=True, color_system=None)
    source = Scripted([RING], HeadraceError("it is gone."), [], KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        watch(source, console, sleep=lambda _: None)
    shown = screen.getvalue()
    assert "it is gone. Ctrl-C ends this" in shown and "no ring runs any more (here)" in shown
    assert shown.count("llama.nf4-3fa0c1") >= 3
    assert shown.endswith("\x1b[?25h\x1b[?1049l")  # the cursor and the screen are there again


def test_nothing_to_watch() -> None:
    for look in (look_once, lambda source: watch(source, Console(file=io.StringIO()))):
        with pytest.raises(HeadraceError, match="no ring runs"):
            look(Scripted([]))


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, served: Served) -> None:
    def stop(self: object) -> list[RingView]:
        raise KeyboardInterrupt

    monkeypatch.setattr(ServerSource, "look", stop)
    with pytest.raises(SystemExit) as ended:
        main(["top", served.url])
    assert ended.value.code == 130


# What nodes show.


def test_rates_are_taken_between_steps() -> None:
    """A process tells its node every 10 seconds; whoever looks does not know when."""
    readings = Readings()
    for second in range(31):
        steps = (second + 4) // 10
        readings.note(float(second), [Sample("a", {"x": "1"}, 50.0 * steps)])
        if second < 16:
            assert readings.rate("a") == 0.0
    assert readings.rate("a", x="1") == pytest.approx(5.0)
    assert readings.rate("a", x="2") == 0.0
    for second in range(31, 60):
        readings.note(float(second), [Sample("a", {"x": "1"}, 150.0)])
    assert readings.rate("a") == 0.0  # it stands still
    readings.note(61.0, [Sample("b", {}, 1.0)])
    assert readings.values("a", "x") == []  # it is gone


def test_of_a_process_that_was_replaced_the_newest_counts() -> None:
    readings = Readings()
    readings.note(0.0, [Sample("pid", {"WorkerId": "old"}, 7.0)])
    readings.note(1.0, [Sample("pid", {"WorkerId": w}, p) for w, p in (("old", 7.0), ("new", 9.0))])
    assert readings.newest("pid") == (9.0, {"WorkerId": "new"})


class Node:
    """Shows metrics as Ray's agents do, of passes of 0.1 s that two stages share."""

    def __init__(self) -> None:
        self.passes = 0

    def text(self) -> str:
        ring, lines = 'ring="r-1"', ["# TYPE other_total counter", "other_total 1"]

        def counter(name: str, value: float, labels: str = "") -> None:
            lines.append(f"# TYPE ray_headrace_{name}_total counter")
            lines.append(f"ray_headrace_{name}_total{{{ring}{labels}}} {value}")

        counter("busy_seconds", 0.1 * self.passes)
        counter("bound_seconds", 0.04 * self.passes)
        counter("passes", self.passes)
        counter("output_tokens", 3 * self.passes)
        for kind in ("replaced", "reconnected", "replanned"):
            counter("recoveries", int(kind == "reconnected"), f',kind="{kind}"')
        counter("recovery_seconds", 0.5, ',phase="connecting"')
        for stage in "01":
            of = f',stage="{stage}"'
            counter("tier_bytes", 1e6 * self.passes, f'{of},tier="nvme",content="weights"')
            for part, seconds in (("compute", 0.05), ("weights", 0.03), ("idle", 0.02)):
                counter("stage_seconds", seconds * self.passes, f'{of},part="{part}"')
            lines.append(f'ray_headrace_stage_pid{{{ring}{of},NodeAddress="10.0.0.1"}} 77')
            for state, value in (("serving", 1), ("gone", 0)):
                lines.append(f'ray_headrace_stage_state{{{ring}{of},state="{state}"}} {value}')
        lines.append(f"ray_headrace_running_sequences{{{ring}}} 3")
        lines.append(f'ray_headrace_planned_pass_seconds{{{ring},term="nvme"}} 0.5')
        lines.append(f'ray_headrace_planned_pass_seconds{{{ring},term="hbm"}} 0.1')
        return "\n".join(lines) + "\n"


@pytest.fixture
def node() -> Iterator[tuple[Node, str]]:
    made = Node()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(made.text().encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        yield made, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_rings_are_known_from_what_nodes_show(node: tuple[Node, str]) -> None:
    shown, url = node
    now = [0.0]
    gone = "http://127.0.0.1:1"
    source = MetricsSource("a cluster", [url, gone], clock=lambda: now[0])
    for second in range(25):
        now[0], shown.passes = float(second), 100 * ((second + 4) // 10)
        (ring,) = source.look()
    assert (ring.name, ring.running, ring.bound_by) == ("r-1", 3, "nvme")
    assert ring.share_of_bound == pytest.approx(0.4)
    assert ring.pass_seconds == pytest.approx(0.1)
    assert ring.tokens_per_second == pytest.approx(30.0)
    assert [stage.stage for stage in ring.stages] == [0, 1]
    stage = ring.stages[0]
    assert (stage.node, stage.pid, stage.state) == ("10.0.0.1", 77, "serving")
    assert stage.parts == pytest.approx(
        {"compute": 0.5, "weights": 0.3, "kv": 0.0, "link": 0.0, "idle": 0.2}
    )
    assert stage.rates["NVMe"] == pytest.approx(1e7)
    assert json.loads(json.dumps(as_json([ring], "here")))["rings"][0]["bubble"] == pytest.approx(
        0.2
    )
    assert ring.recoveries == 1
    assert ring.last == RecoveryView((), {"connecting": 0.5}, kinds=("reconnected",))
    assert not list(parse(shown.text(), "ray_other_"))


def test_nodes_that_are_gone_are_looked_for_again(node: tuple[Node, str]) -> None:
    _, url = node
    source = MetricsSource("here", ["http://127.0.0.1:1"], lambda: [url])
    with pytest.raises(HeadraceError, match="no Ray node answers"):
        source.look()
    assert [ring.name for ring in source.look()] == ["r-1"]
