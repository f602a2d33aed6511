"""Traces of real runs: the file that is written, and whether it says what the counters say."""

import json
import logging
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from commands import headrace, wait_for
from rings import local_ring, manual_plan

from headrace import LLM, SamplingParams
from headrace.cluster.cli.main import main
from headrace.cluster.engine import Engine
from headrace.cluster.pipeline import LocalPipeline, Pending
from headrace.cluster.ring import Ring
from headrace.cluster.ring_trace import RingTrace
from headrace.cluster.stage_traces import StageTrace
from headrace.cluster.tokenizer import load_tokenizer
from headrace.cluster.trace_file import (
    RunTrace,
    check_writable,
    lanes,
    write_trace,
)
from headrace.runtime.store import Store
from headrace.runtime.trace import Kind, Span, Trace
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.placement import Tier
from headrace.scheduler.plan import Pass, PassResult, StageTimes

Event = dict[str, Any]


class Keeping:
    """A pipeline that keeps each pass's times."""

    def __init__(self, pipeline: LocalPipeline) -> None:
        self._pipeline = pipeline
        self.times: dict[tuple[int, int], StageTimes] = {}

    def submit(self, a_pass: Pass) -> Pending:
        outer, pending = self, self._pipeline.submit(a_pass)

        class Kept:
            def result(self) -> list[PassResult]:
                results = pending.result()
                for result in results:
                    outer.times[result.times.stage, result.step] = result.times
                return results

        return Kept()

    def close(self) -> None:
        self._pipeline.close()


def events_of(file: Path) -> list[Event]:
    loaded = json.loads(file.read_text())
    assert set(loaded) == {"displayTimeUnit", "otherData", "traceEvents"}
    events: list[Event] = loaded["traceEvents"]
    return events


def tracks_of(events: list[Event]) -> dict[tuple[str, str], list[Event]]:
    """Spans in order of their beginning, by process ("driver", "stage 0") and track."""
    named = {
        (e["name"], e["pid"], e["tid"]): e["args"].get("name", "") for e in events if e["ph"] == "M"
    }
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            process = named["process_name", event["pid"], 0].split(" on ")[0]
            tracks[process, named["thread_name", event["pid"], event["tid"]]].append(event)
    return tracks


def check_nesting(spans: list[Event]) -> None:
    """Each span follows what came before, or lies in it. In nanoseconds: floats of us round."""
    ends: list[int] = []
    for span in spans:
        start = round(span["ts"] * 1e3)
        end = start + round(span["dur"] * 1e3)
        assert start >= 0 and end >= start
        while ends and ends[-1] <= start:
            ends.pop()
        assert not ends or end <= ends[-1], span
        ends.append(end)


def seconds(spans: list[Event], kind: Kind) -> float:
    return sum(span["dur"] for span in spans if span["cat"] == kind.value) / 1e6


def check_kinds(tracks: dict[tuple[str, str], list[Event]], wanted: set[Kind]) -> None:
    seen = {span["cat"] for spans in tracks.values() for span in spans}
    assert seen == {kind.value for kind in wanted}


ON_CPU = set(Kind) - {Kind.GRAPH, Kind.KV_COPY, Kind.KV_LOG, Kind.KV_WAIT}
ON_CPU -= {Kind.RECOVERY, Kind.REPLACE}
BETWEEN_PROCESSES = {Kind.SEND, Kind.RECV}


def traced_run(stories: Path, file: Path) -> tuple[Keeping, list[int]]:
    """Two stages in this process, of which layers are streamed from both tiers."""
    store = Store.open(stories)
    tiers = [Tier.NVME, Tier.HOST, Tier.DEVICE] * (len(store.layers) // 3)
    plan = manual_plan(store, stages=2, cyclic=True, tier=tiers)
    with local_ring(stories, plan, trace=True) as pipeline:
        kept = Keeping(pipeline)
        trace = RunTrace(file)
        tokenizer = load_tokenizer(stories)
        with Engine(
            Ring(plan, kept, traces=pipeline),
            tokenizer,
            stop_ids=frozenset(),
            digest=store.digest,
            dtype="float32",
            trace=trace,
        ) as engine:
            params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
            for i in range(3):
                engine.add([5 + i, 6, 7], params, seed=i)
            tokens = []
            while engine.has_work:
                tokens += [c.token_ids for c in engine.step()]
        assert trace.written
        for split, stage in zip(trace.splits(), engine.stats.stages, strict=True):
            assert split is not None and min(split.dequant, split.matmul, split.attention) > 0
            assert split.known < stage.total
    return kept, [len(some) for some in tokens]


def test_a_trace_says_what_the_counters_say(stories: Path, tmp_path: Path) -> None:
    kept, lengths = traced_run(stories, tmp_path / "trace.json")
    assert lengths == [5, 5, 5]
    tracks = tracks_of(events_of(tmp_path / "trace.json"))
    check_kinds(tracks, ON_CPU - BETWEEN_PROCESSES)
    for spans in tracks.values():
        check_nesting(spans)
    steps = {step for _, step in kept.times}
    for stage in (0, 1):
        compute = tracks[f"stage {stage}", "compute"]
        passes = {int(e["name"].split()[1]): e for e in compute if e["cat"] == "pass"}
        assert set(passes) == steps
        errors = defaultdict(list)
        for step, outer in passes.items():
            end = outer["ts"] + outer["dur"]
            inside = [e for e in compute if outer["ts"] <= e["ts"] < end]
            assert len([e for e in inside if e["cat"] == "visit"]) == 6
            times = kept.times[stage, step]
            for kind, counted in (
                (Kind.PASS, times.total),
                (Kind.WEIGHTS_WAIT, times.weights_wait),
                (Kind.LINK_WAIT, times.link_wait),
            ):
                errors[kind].append(abs(seconds(inside, kind) - counted) / times.total)
        # Most passes: now and then a thread is put to sleep between the two clocks.
        assert {kind for kind, some in errors.items() if statistics.median(some) > 0.05} == set()
    driver = [e for (process, _), spans in tracks.items() if process == "driver" for e in spans]
    assert len([e for e in driver if e["cat"] == "in flight"]) == len(steps)


def test_reads_name_their_files_and_bytes(stories: Path, tmp_path: Path) -> None:
    traced_run(stories, tmp_path / "trace.json")
    store = Store.open(stories)
    tracks = tracks_of(events_of(tmp_path / "trace.json"))
    reads = [e for spans in tracks.values() for e in spans if e["cat"] == "read"]
    sizes = {f"read {block.file.stem}": block.nbytes for block in store.layers}
    seen = {(e["name"], e["args"]["bytes"]) for e in reads}
    assert seen >= set(sizes.items())  # and pieces that the choice of a storage read


def span(start: int, end: int, kind: Kind = Kind.MATMUL, name: str = "", number: int = -1) -> Span:
    return Span(kind, start, end, "", name, number, 0)


def test_spans_that_cross_get_tracks_of_their_own() -> None:
    nested = [span(0, 100), span(0, 40), span(10, 20), span(20, 40), span(40, 100)]
    assert lanes(reversed(nested)) == [nested]
    crossing = [span(0, 10), span(5, 15), span(10, 20), span(12, 30)]
    assert lanes(crossing) == [
        [crossing[0], crossing[2]],
        [crossing[1]],
        [crossing[3]],
    ]


def test_clocks_of_other_nodes_and_arrows(tmp_path: Path) -> None:
    ours = Trace("a", (span(1_000, 9_000, Kind.SEND, "0->1", 7),), {}, True)
    theirs = (span(502_000, 512_000, Kind.RECV, "0->1", 7),)
    far = Trace("b", theirs, {}, True, ahead=500_000, uncertain=300)
    stages = tuple(StageTrace(i, each) for i, each in enumerate((ours, None, far)))
    write_trace(tmp_path / "t.json", RingTrace(Trace("a", (), {}, True), stages, 64))
    events = events_of(tmp_path / "t.json")
    sent, received = (e for e in events if e["ph"] == "X")
    assert (sent["pid"], sent["ts"], sent["dur"]) == (2, 0.0, 8.0)
    assert (received["pid"], received["ts"], received["dur"]) == (4, 1.0, 10.0)
    begins, ends = (e for e in events if e.get("cat") == "hop")
    assert (begins["ph"], begins["ts"], ends["ph"], ends["ts"]) == ("s", 0.0, "f", 11.0)
    assert begins["id"] == ends["id"]


def test_an_earlier_trace_outlives_a_failure(tmp_path: Path) -> None:
    file, none = tmp_path / "t.json", Trace("a", (), {}, True)
    write_trace(file, RingTrace(none, (), 64))
    before = file.read_bytes()
    broken = Trace("a", (span(0, 1)._replace(nbytes=object()),), {}, True)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        write_trace(file, RingTrace(none, (StageTrace(0, broken),), 64))
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    check_writable(file)


def test_places_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(HeadraceError, match="is no trace"):
        check_writable(tmp_path / "rows.jsonl")
    with pytest.raises(HeadraceError, match="is a directory"):
        check_writable(tmp_path)
    with pytest.raises(HeadraceError, match="there is no directory"):
        check_writable(tmp_path / "missing" / "t.json")
    check_writable(tmp_path / "new.json")


def test_a_trace_does_not_replace_the_jobs_output(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["generate", str(stories), "--input", "in", "--output", str(tmp_path / "out.jsonl")]
    with pytest.raises(SystemExit):
        main([*job, "--trace", str(tmp_path / "out.jsonl")])
    assert "is the --output" in capsys.readouterr().err


def test_a_disk_that_is_full_does_not_hide_the_results(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class NoStages:
        def begin_trace(self, passes: int) -> None: ...

        def end_trace(self) -> Callable[[], list[StageTrace]]:
            return lambda: [StageTrace(0, None)]

    trace = RunTrace(tmp_path / "gone" / "t.json")  # a folder that was removed
    trace.tracing.follow(NoStages())
    with caplog.at_level(logging.WARNING):
        trace.close()
    assert not trace.written and trace.splits() == [None]
    assert "lacks stage 0" in caplog.text and "was not written" in caplog.text


@pytest.mark.slow
def test_a_stage_that_dies_leaves_the_others_traces(stories: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    room: dict[str, Any] = {"device": "cpu", "host_memory": "1MiB", "context": 128}
    with LLM(
        stories, stages=2, device_memory="8MiB", resident_layers=2, trace=str(file), **room
    ) as llm:
        llm.generate("Once upon", SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
        source = llm._engine.trace.tracing._source  # type: ignore[union-attr]
        actor = source._actors[1]  # type: ignore[union-attr]
        ray.kill(actor)
        with pytest.raises(ray.exceptions.RayActorError):  # it may still answer for a moment
            while True:
                ray.get(actor.clock.remote())
    tracks = tracks_of(events_of(file))
    assert {process for process, _ in tracks} == {"driver", "stage 0"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_leaves_a_whole_trace(stories: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"Once there were {i}"}) for i in range(300)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    output, file = tmp_path / "out.jsonl", tmp_path / "t.json"
    job = ["generate", stories, "--input", "in.jsonl", "--output", output, "--trace", file]
    job += ["--stages", 2, "--device", "cpu", "--device-memory", "6MiB", "--host-memory", "1MiB"]
    with headrace(tmp_path, *job, "--context", 128, "--max-tokens", 12) as command:
        wait_for(
            lambda: output.exists() and output.stat().st_size > 0, 120.0, lambda: command.stderr
        )
        command.interrupt()
        assert command.wait() == 130, command.stderr
    assert "The trace is in" in command.stdout
    assert "dequant" in command.stdout and "between passes" in command.stdout
    events = events_of(file)
    tracks = tracks_of(events)
    assert {process for process, _ in tracks} == {"driver", "stage 0", "stage 1"}
    check_kinds(tracks, ON_CPU)
    for spans in tracks.values():
        check_nesting(spans)
    ends = {ph: {e["id"] for e in events if e["ph"] == ph} for ph in ("s", "f")}
    assert len(ends["s"] & ends["f"]) > 10
