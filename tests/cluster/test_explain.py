"""`headrace explain`: what a run left, and what each change would buy."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from headrace.cluster.bench.local import local_engine
from headrace.cluster.cli.main import main
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.engine_stats import EngineStats
from headrace.cluster.explain.explanation import Explanation, explain
from headrace.cluster.explain.report import (
    DecodePasses,
    EmptierPasses,
    ReportWriter,
    RunReport,
    read_report,
)
from headrace.cluster.job_files import JobFiles
from headrace.cluster.job_report import JobReport, RingWork, Work
from headrace.cluster.jobs import Job
from headrace.cluster.run_plan import kv_alternatives
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError
from headrace.scheduler.inputs import Budget, Choices, DeviceProfile, ModelShape, Workload
from headrace.scheduler.links import Links
from headrace.scheduler.plan import StageTimes
from headrace.scheduler.plan_inputs import PlanInputs
from headrace.scheduler.request import SamplingParams

GB = 10**9
MANY = 1_000_000
GPU = DeviceProfile("cuda", 2.0, 24.0, 100.0, 1000.0, 2e-4, 10.0)
SHAPE = ModelShape(
    layer_bytes=(481_300_480,) * 40,
    kv_format="bf16",
    layer_kv_bytes=(262_144,) * 40,
    layer_parameters=(855_638_016,) * 40,
    layer_active_parameters=(855_638_016,) * 40,
    largest_matrix=8192 * 28672,
    embed_bytes=16_777_216,
    head_bytes=16_777_216,
    hidden_size=8192,
    vocab_size=1024,
    intermediate_size=28672,
    max_context=131072,
    compute_bytes=2,
    needs_scratch=True,
)
INT4 = replace(
    SHAPE, kv_format="int4", layer_kv_bytes=(70_000,) * 40, layer_tail_bytes=(262_144,) * 40
)


def inputs(stages: int = 1) -> PlanInputs:
    profiles = (GPU,) * stages
    return PlanInputs(
        SHAPE,
        profiles,
        (Budget(10 * GB, 0),) * stages,
        Workload(1024),
        Choices(),
        Links.of(profiles),
        tuple(f"node {i}" for i in range(stages)),
    )


def report(of: PlanInputs, slower: float, waited: float) -> RunReport:
    """Of a run whose rounds took `slower` times what was expected."""
    plan = of.plan()
    seconds = slower * plan.prediction.expected_seconds / plan.passes_in_flight
    sequences = plan.prediction.sequences // plan.passes_in_flight
    times = StageTimes(0, 100.0, 100.0 * waited, 0.0, 10 * GB, 0)
    return RunReport(
        version=2,
        model="m",
        finished=True,
        inputs=of,
        alternatives={"int4": INT4},
        seconds=100.0,
        passes=10,
        prompt_tokens=10,
        output_tokens=100,
        busy_seconds=100.0,
        bound_seconds=90.0,
        requests=MANY,
        longest=1024,
        stages=(times,),
        decode=DecodePasses(10, seconds, sequences, 1024, 16.0, 1.0),
    )


def test_what_binds_is_what_would_help() -> None:
    found = explain(report(inputs(), 1.25, 0.9))
    assert found.plan.prediction.bound_by == "nvme"
    assert found.ratio == pytest.approx(1.25, rel=0.02)
    assert found.blamed.startswith("drives and links 1.2")
    gains = {gain.what: gain for gain in found.gains}
    assert gains["a second drive as fast"].factor == pytest.approx(2.0, rel=0.05)
    assert gains["--kv-format int4"].factor > 1.2
    assert any(what.startswith("+") and "host memory" in what for what in gains)
    assert gains["one more stage like the last, on a node of its own"].factor > 1.9
    assert "processors that compute twice as fast" not in gains
    factors = [gain.factor for gain in found.gains]
    assert factors == sorted(factors, reverse=True) and min(factors) > 1.02


def test_where_nobody_waited_drives_are_not_the_advice() -> None:
    one = replace(inputs(), choices=Choices(micro_batches=1))
    found = explain(report(one, 3.0, 0.02))
    assert "each layer's computing" in found.blamed
    gains = {gain.what: gain.at_most for gain in found.gains}
    assert "a second drive as fast" not in gains
    assert gains["one more stage like the last, on a node of its own"] > 1.3


def shape_of_load(of: PlanInputs, **other: float) -> RunReport:
    """The report of a run as planned whose decodes had what `other` says."""
    made = report(of, 1.0, 0.9)
    assert made.decode is not None
    named = {name: other.pop(name) for name in ("requests", "longest") if name in other}
    return replace(made, decode=replace(made.decode, **other), **named)


def test_room_for_more_buys_nothing_where_nobody_waited() -> None:
    busy = explain(report(inputs(), 1.0, 0.9))
    assert {gain.what for gain in busy.gains} >= {"--kv-format int4"}
    assert busy.load.waited and busy.load.sequences == busy.plan.prediction.sequences
    few = explain(shape_of_load(inputs(), sequences=8, waiting=0.0, requests=8))
    assert few.sequences == 8
    gains = {gain.what: gain for gain in few.gains}
    assert "--kv-format int4" not in gains
    assert not any("--context" in what for what in gains)
    more = next(gain for what, gain in gains.items() if what.startswith("more requests"))
    assert more.sequences > 8 and more.factor > 2
    assert gains["a second drive as fast"].sequences == 8


def test_gains_are_those_of_the_jobs_real_lengths() -> None:
    """Where passes have all the sequences that they may, room for more pages brings none of them in."""
    one = replace(inputs(), choices=Choices(max_sequences=16))
    planned = one.plan()
    made = shape_of_load(one, sequences=16, context=60, pages=1.0, longest=100)
    found = explain(made)
    assert found.sequences == 16 and planned.max_sequences == 16
    gains = {gain.what: gain for gain in found.gains}
    [what] = [what for what in gains if "(--max-sequences" in what]
    # Of so many requests few are at their longest together.
    assert gains.pop(what).sequences == planned.num_pages > 16
    gains.pop("no --max-sequences", None)
    stages = "one more stage like the last, on a node of its own"
    assert all(gain.sequences == 16 for name, gain in gains.items() if name != stages)


def test_pages_that_bound_a_run_are_what_more_memory_is_counted_in() -> None:
    one = replace(inputs(), budgets=(Budget(30 * GB, 0),), choices=Choices(max_sequences=256))
    planned = one.plan()
    ran = planned.num_pages // 6
    assert 16 < ran < 200
    found = explain(shape_of_load(one, sequences=ran, context=100, pages=2.0, longest=128))
    assert found.load.room(planned) == ran  # not as many as pages of 2 each would hold
    more = [gain.sequences for gain in found.gains if "device memory (" in gain.what]
    assert more and max(more) > 1.2 * ran


def test_more_at_once_than_there_are_requests_is_no_gain() -> None:
    one = replace(inputs(), choices=Choices(max_sequences=16))
    found = explain(
        shape_of_load(one, sequences=16, context=60, pages=1.0, longest=60, requests=20)
    )
    more = next(gain for gain in found.gains if "--max-sequences" in gain.what)
    assert more.what.endswith("(--max-sequences 20)") and more.sequences == 20
    assert more.factor <= 2.0  # 20 in one go, not 16 and 4 after them


def test_what_fewer_sequences_took_tells_what_more_will_take() -> None:
    one = replace(inputs(), budgets=(Budget(30 * GB, 0),), choices=Choices(max_sequences=16))
    made = shape_of_load(one, sequences=16, seconds=2.0, context=60, pages=1.0, longest=100)
    made = replace(made, stages=(replace(made.stages[0], weights_wait=0.0),))
    assert made.decode is not None
    grown = replace(made.decode, emptier=EmptierPasses(0.5, 4))
    same = replace(made.decode, emptier=EmptierPasses(2.0, 4))
    by_sequence = explain(replace(made, decode=grown))
    by_layer = explain(replace(made, decode=same))
    assert "arithmetic" in by_sequence.blamed and "arithmetic" not in by_layer.blamed

    def more(found: Explanation) -> float:
        return next((gain.at_most for gain in found.gains if "--max-seq" in gain.what), 1.0)

    assert more(by_layer) > 2 > more(by_sequence)


@pytest.mark.slow
def test_each_drive_is_advised_alone() -> None:
    slow = replace(GPU, nvme_gbps=0.5)
    of = inputs(2)
    found = explain(report(replace(of, profiles=(GPU, slow)), 1.0, 0.9))
    gains = {gain.what: gain.factor for gain in found.gains}
    one = gains["a second drive as fast on the node of stage 0"]
    assert gains["a second drive as fast on every node"] > one > 1.02


@dataclass
class Planned:
    inputs: PlanInputs
    stats: EngineStats
    num_waiting: int = 1
    num_running: int = 4


def test_a_job_leaves_what_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats, output, now = EngineStats(1), tmp_path / "out.jsonl", [0.0]

    def job() -> JobReport:
        work = Work.of(stats)
        return JobReport(output, output, 4, 2, 0, 0, 2, False, now[0], work)

    engine = Planned(inputs(), stats)
    writer = ReportWriter(output, "m", engine, {"int4": INT4}, clock=lambda: now[0])
    for tokens, drawn, seconds in (
        (80, 4, 9.0),
        (4, 4, 2.0),
        (4, 4, 3.0),
        (4, 4, 2.5),
        (1, 1, 0.1),
    ):
        stats.passes += 1
        stats.tokens += tokens
        stats.output_tokens += drawn
        stats.contexts += 100 * drawn
        stats.slice_pages += 2 * drawn
        stats.busy_seconds += seconds
        now[0] += 10.0
        writer.note(job())
    assert output.with_name("out.jsonl.report.json").exists()  # of a job that runs
    assert not read_report(output).finished
    writer.finish(job())
    found = read_report(output)
    assert found.decode is not None
    assert found.decode == DecodePasses(3, 2.5, 4, context=100, pages=2.0, waiting=1.0)
    assert found.requests == 5
    assert found.inputs == inputs()
    main_with(["explain", str(output)])
    text = capsys.readouterr().out
    assert "reading from NVMe" in text and "What would change that" in text
    main_with(["explain", str(output), "--json"])
    assert json.loads(capsys.readouterr().out)["gains"]


def test_a_report_is_of_the_ring_that_ran_last(tmp_path: Path) -> None:
    engine, output, now = Planned(inputs(2), EngineStats(2)), tmp_path / "out.jsonl", [0.0]
    stats = engine.stats
    writer = ReportWriter(output, "m", engine, {}, clock=lambda: now[0])
    start = Work.of(stats)

    def run(passes: int, seconds: float) -> None:
        for _ in range(passes):
            stats.passes += 1
            stats.tokens += 4
            stats.output_tokens += 4
            stats.busy_seconds += seconds
            writer.note(job())

    def job() -> JobReport:
        work = Work.of(stats)
        last = RingWork(work.since(stats.ring_start), 7.0) if stats.moves else None
        return JobReport(output, output, 4, 2, 0, 0, 2, False, 60.0, work.since(start), last)

    run(5, 9.0)
    stats.moved(1)
    engine.inputs = inputs(1)
    run(3, 2.0)
    writer.finish(job())
    found = read_report(output)
    assert found.inputs == inputs(1) and len(found.stages) == 1
    assert (found.passes, found.output_tokens, found.busy_seconds) == (3, 12, 6.0)
    assert found.seconds == 7.0
    assert found.decode is not None and (found.decode.passes, found.decode.seconds) == (3, 2.0)


def test_a_job_of_short_rows_gains_nothing_from_room_for_long_ones(
    stories: Path, tmp_path: Path
) -> None:
    """The plan has room for 4 sequences of the whole context. 8 shorter ones ran, and no more may."""
    rows = [json.dumps({"prompt": f"Once there were {i}"}) for i in range(32)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    output = tmp_path / "out.jsonl"
    options = EngineOptions(
        stories, device="cpu", device_memory=60 << 20, host_memory=0, max_sequences=8
    )
    store, defaults = Store.open(stories), SamplingParams(max_tokens=24)
    with (
        JobFiles(tmp_path / "in.jsonl", output, store.digest, defaults) as files,
        local_engine(options) as engine,
    ):
        writer = ReportWriter(output, "stories", engine, kv_alternatives(options, store))
        job = Job(engine, engine.tokenizer, files, model_name="stories")
        writer.finish(job.run(writer.note))
    made = read_report(output)
    assert made.decode is not None and made.requests == 32
    assert made.decode.sequences == 8 and made.decode.waiting > 0.3
    assert 5 < made.decode.context < made.longest < 40 and made.decode.pages == 1.0
    found = explain(made)
    assert found.plan.prediction.sequences == 4 and found.sequences == 8
    gains = {gain.what: gain.factor for gain in found.gains}
    room = ("--kv-format", "--context", "sequences half", "no --max-sequences", "+")
    assert max((gains[what] for what in gains if what.startswith(room)), default=1.0) < 1.1
    assert "more sequences at once (--max-sequences 32)" in gains


def main_with(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def test_what_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match=r"there is no .*out\.jsonl\.report\.json"):
        read_report(tmp_path / "out.jsonl")
    file = tmp_path / "out.jsonl.report.json"
    file.write_text("{}")
    with pytest.raises(HeadraceError, match="is no report of a run"):
        read_report(file)
    file.write_bytes(msgspec.json.encode(replace(report(inputs(), 1.0, 0.5), version=7)))
    with pytest.raises(HeadraceError, match="is of version 7"):
        read_report(tmp_path / "out.jsonl")
