"""Batch jobs on a fake engine. Run as a program, this file is the job that gets killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from headrace.cluster.cli.generate import (
    Meter,
    Setting,
    duration,
    final_table,
    run_job,
    status_line,
)
from headrace.cluster.cli.stage_table import stage_table
from headrace.cluster.completion import Completion
from headrace.cluster.job_files import JobFiles
from headrace.cluster.job_report import ComputeSplit, JobReport, RingWork, Work
from headrace.cluster.jobs import Job
from headrace.cluster.seeds import derive_seed
from headrace.scheduler.errors import JobError, RequestError, StageError
from headrace.scheduler.placement import (
    Placement,
    Plan,
    Prediction,
    StageMemory,
    Tier,
    contiguous_visits,
)
from headrace.scheduler.plan import Sample, StageTimes
from headrace.scheduler.request import SamplingParams
from headrace.scheduler.speculation import DraftCounts

DEFAULTS = SamplingParams(max_tokens=6)
PLAN = Plan(
    placement=Placement(2, contiguous_visits(4, 2, 1), (Tier.NVME,) * 4),
    slot_bytes=1 << 20,
    ring_slots=(2, 2),
    num_pages=8,
    kv_format="bf16",
    max_context=512,
    token_budget=64,
    max_sequences=4,
    micro_batches=2,
    micro_batch_tokens=32,
    logit_rows=32,
    sample_rows=32,
    graph_rows=0,
    passes_in_flight=1,
    ahead=0,
    memory=(StageMemory(0, 2 << 20, 0, 0, 0, 0, 0, 0, 0),) * 2,
    nvme_bytes_a_pass=(2 << 20, 2 << 20),
    host_bytes_a_pass=(0, 1 << 20),
    prediction=Prediction(4, 0.5, 8.0, "nvme", {"nvme": 0.5, "pcie": 0.1}),
)
SETTING = Setting(PLAN, 9 << 20, 4 << 20)


class LetterTokenizer:
    """One token a character."""

    bos_token_id = None
    chat_template = "a"

    def __init__(self) -> None:
        self.backend_tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, "?"))
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")

    def __len__(self) -> int:
        return 128

    def __call__(self, text: str, /, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.backend_tokenizer.encode(text).ids}

    def apply_chat_template(self, conversation: Any, /, **_: Any) -> str:
        return "".join(message["content"] for message in conversation)

    def decode(self, token_ids: Any, /) -> str:
        return "".join(chr(token) for token in token_ids)


@dataclass
class FakeStats:
    passes: int = 0
    moves: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    busy_seconds: float = 0.0
    bound_seconds: float = 0.0
    drafts: DraftCounts = field(default_factory=DraftCounts)
    stages: list[StageTimes] = field(default_factory=lambda: [StageTimes(0, 0, 0, 0, 0, 0)])


@dataclass
class FakeRequest:
    prompt: list[int]
    params: SamplingParams
    identity: str
    output: list[int]
    length: int
    on_token: Callable[[Sample], None] | None

    def draw(self) -> None:
        token = random.Random(f"{self.identity}/{len(self.output)}").randint(97, 122)
        self.output.append(token)
        if self.on_token is not None:
            self.on_token(Sample(0, token, None, ()))


class FakeEngine:
    """`batch` requests at a time, one letter each a pass, drawn from the seed and the prompt."""

    model_digest = "fake"
    max_context = 40

    def __init__(self, batch: int = 4, pass_seconds: float = 0.0) -> None:
        self.stats = FakeStats()
        self.most_waiting = 0
        self.seeds: list[int] = []
        self.on_step: Callable[[int], None] = lambda step: None
        self._batch, self._pass_seconds = batch, pass_seconds
        self._requests: dict[int, FakeRequest] = {}
        self._count = 0

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_waiting(self) -> int:
        return max(len(self._requests) - self._batch, 0)

    def add(
        self,
        token_ids: list[int],
        params: SamplingParams,
        seed: int,
        *,
        keep: bool = False,
        adapter: str | None = None,
        said: Sequence[Sample] = (),
        on_token: Callable[[Sample], None] | None = None,
    ) -> int:
        if token_ids == [ord("!")] and self._count % 2:
            raise RequestError("the engine refuses this")
        self._count += 1
        self.seeds.append(seed)
        identity = f"{seed}/{token_ids}"
        length = random.Random(identity).randint(1, params.max_tokens)
        output = [sample.token for sample in said]
        request = FakeRequest(token_ids, params, identity, output, length, on_token)
        self._requests[self._count] = request
        self.most_waiting = max(self.most_waiting, self.num_waiting)
        return self._count

    def abort(self, request_id: int) -> None:
        self._requests.pop(request_id, None)

    def has_started(self, request_id: int) -> bool:
        return request_id in list(self._requests)[: self._batch]

    def step(self) -> list[Completion]:
        self.stats.passes += 1
        self.on_step(self.stats.passes)
        time.sleep(self._pass_seconds)
        done = []
        for request_id, request in list(self._requests.items())[: self._batch]:
            request.draw()
            self.stats.output_tokens += 1
            if len(request.output) == request.length:
                done.append(self._complete(request_id))
        return done

    def _complete(self, request_id: int) -> Completion:
        request = self._requests.pop(request_id)
        text = LetterTokenizer().decode(request.output)
        reason = "abort" if request.prompt == [ord("?")] else "length"
        return Completion(request_id, request.output, text, reason, None, len(request.prompt))


def write_input(path: Path, count: int = 40) -> Path:
    """Rows of both shapes, with rows that cannot run between them."""
    rows: list[Any] = []
    for i in range(count):
        if i % 10 == 3:
            rows.append('{"prompt": ')
        elif i % 10 == 4:
            rows.append({"id": "r0", "prompt": "twice"})
        elif i % 10 == 5:
            rows.append({"id": f"r{i}", "prompt": "long" * 20})
        elif i % 10 == 6:
            rows.append({"id": f"r{i}", "messages": [{"role": "user", "content": "hi"}], "n": 3})
        elif i % 10 == 7:
            body = {"prompt": "hello", "max_tokens": 3}
            url = "/v1/completions"
            rows.append({"custom_id": f"r{i}", "method": "POST", "url": url, "body": body})
        else:
            rows.append({"id": f"r{i}", "prompt": "once"})
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def make_job(engine: FakeEngine, source: Path, output: Path, **changes: Any) -> Job:
    defaults = changes.pop("defaults", DEFAULTS)
    files = JobFiles(source, output, engine.model_digest, defaults)
    return Job(engine, LetterTokenizer(), files, model_name="fake", **changes)


def run(engine: FakeEngine, source: Path, output: Path, **changes: Any) -> JobReport:
    return make_job(engine, source, output, **changes).run(lambda report: None)


def rows_of(output: Path) -> Counter[str]:
    """Lines of output and quarantine; `created` differs between jobs that began at other times."""
    lines = Counter[str]()
    for path in (output, output.with_name("out.errors.jsonl")):
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            if row.get("response"):
                del row["response"]["body"]["created"]
            lines[json.dumps(row)] += 1
    return lines


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_input(tmp_path / "in.jsonl")


@pytest.fixture
def whole(tmp_path: Path, source: Path) -> Counter[str]:
    """What an uninterrupted run writes."""
    (tmp_path / "whole").mkdir()
    run(FakeEngine(), source, tmp_path / "whole" / "out.jsonl")
    return rows_of(tmp_path / "whole" / "out.jsonl")


def test_every_row_ends_once(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.jsonl"
    report = run(FakeEngine(), source, output)
    assert report.complete
    assert (report.total, report.answered, report.quarantined) == (40, 28, 12)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    ids = {row.get("id") if "custom_id" not in row else row["custom_id"] for row in answers}
    assert ids == {f"r{i}" for i in range(40) if i % 10 not in (3, 4, 5)}
    assert len(answers) == 28
    refused = report.quarantine.read_text().splitlines()
    reasons = {row["line"]: row["error"] for row in map(json.loads, refused)}
    assert "not valid JSON" in reasons[4]
    assert reasons[5] == "the id 'r0' was used by an earlier row"
    assert "the prompt has 80 tokens and the context 40" in reasons[6]
    assert [len(row["choices"]) for row in answers if "choices" in row] == [3] * 4
    assert report.work.output_tokens > 0


def test_a_complete_job_has_nothing_to_do(
    tmp_path: Path, source: Path, whole: Counter[str]
) -> None:
    output = tmp_path / "whole" / "out.jsonl"
    engine = FakeEngine()
    report = run(engine, source, output)
    assert (report.resumed, report.complete, engine.stats.passes) == (40, True, 0)
    assert rows_of(output) == whole


def test_results_do_not_depend_on_batching(
    tmp_path: Path, source: Path, whole: Counter[str]
) -> None:
    output = tmp_path / "out.jsonl"
    run(FakeEngine(batch=1), source, output, max_waiting=1)
    assert rows_of(output) == whole


def test_only_a_window_of_rows_waits(tmp_path: Path, source: Path) -> None:
    engine = FakeEngine()
    run(engine, source, tmp_path / "out.jsonl", max_waiting=5)
    assert engine.most_waiting <= 5 + 2  # the last row may bring three requests


def test_seeds(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    rows = [{"prompt": "a", "n": 2}, {"prompt": "a", "seed": 40, "n": 2}, {"prompt": "a"}]
    source.write_text("\n".join(map(json.dumps, rows)))
    engine, other = FakeEngine(), FakeEngine()
    run(engine, source, tmp_path / "out.jsonl")
    assert engine.seeds[2:4] == [derive_seed("fake", 40, 0), derive_seed("fake", 40, 1)]
    assert len(set(engine.seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in engine.seeds)
    other.model_digest = "another"
    run(other, source, tmp_path / "other.jsonl")
    assert not set(engine.seeds) & set(other.seeds)


def test_rows_that_the_engine_refuses_or_gives_up(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    rows = [{"prompt": "!", "n": 3}, {"prompt": "?"}, {"prompt": "a"}]
    source.write_text("\n".join(map(json.dumps, rows)))
    report = run(FakeEngine(), source, tmp_path / "out.jsonl")
    assert (report.answered, report.quarantined) == (1, 2)
    refused = [json.loads(line)["error"] for line in report.quarantine.read_text().splitlines()]
    assert sorted(refused) == ["the engine gave the request up", "the engine refuses this"]


def test_a_stop_drains_and_the_next_run_goes_on(
    tmp_path: Path, source: Path, whole: Counter[str]
) -> None:
    output, engine = tmp_path / "out.jsonl", FakeEngine()
    job = make_job(engine, source, output, max_waiting=1)
    engine.on_step = lambda step: job.request_stop() if step == 3 else None
    report = job.run(lambda report: None)
    assert report.stopping
    assert not report.complete
    assert not engine.has_work
    assert 0 < report.answered < 28
    again = run(FakeEngine(), source, output)
    assert (again.complete, again.resumed) == (True, report.finished)
    assert rows_of(output) == whole


def test_a_stop_drops_rows_that_only_wait(
    tmp_path: Path, source: Path, whole: Counter[str]
) -> None:
    output, engine = tmp_path / "out.jsonl", FakeEngine(batch=2)
    job = make_job(engine, source, output)
    running: list[int] = []
    engine.on_step = lambda step: job.request_stop() if step == 1 else None
    report = job.run(lambda report: running.append(report.running))
    assert max(running) <= 2
    assert report.answered <= 2
    run(FakeEngine(), source, output)
    assert rows_of(output) == whole


def test_a_second_stop_gives_up_what_runs(
    tmp_path: Path, source: Path, whole: Counter[str]
) -> None:
    output, engine = tmp_path / "out.jsonl", FakeEngine()
    job = make_job(engine, source, output)
    engine.on_step = lambda step: job.request_stop() if step in (2, 3) else None
    report = job.run(lambda report: None)
    assert engine.stats.passes == 3
    assert not engine.has_work
    assert not report.complete
    run(FakeEngine(), source, output)
    assert rows_of(output) == whole


def test_a_dead_stage_loses_nothing(tmp_path: Path, source: Path, whole: Counter[str]) -> None:
    output, engine = tmp_path / "out.jsonl", FakeEngine()

    def die(step: int) -> None:
        if step == 9:
            raise StageError("stage 1 died")

    engine.on_step = die
    with pytest.raises(StageError):
        run(engine, source, output)
    assert 0 < run(FakeEngine(), source, output).resumed < 40
    assert rows_of(output) == whole


def test_an_input_that_changed_is_refused(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(FakeEngine(), source, output)
    write_input(source, 41)
    with pytest.raises(JobError, match="belongs to another job: the input's digest"):
        run(FakeEngine(), source, output)


def test_parameters_that_changed_are_named(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(FakeEngine(), source, output)
    with pytest.raises(JobError, match="max_tokens was 6 and is 7"):
        run(FakeEngine(), source, output, defaults=SamplingParams(max_tokens=7))


def start(folder: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_job_killed_at_random_instants_ends_as_if_it_had_not(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl", 400)
    whole, output = tmp_path / "whole" / "out.jsonl", tmp_path / "out.jsonl"
    whole.parent.mkdir()
    run(FakeEngine(), source, whole)
    chance = random.Random(0)
    kills = 0
    for _ in range(10):
        size = output.stat().st_size if output.exists() else -1
        process = start(tmp_path)
        while process.poll() is None and (not output.exists() or output.stat().st_size == size):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 8  # otherwise the job is too short to show anything
    assert output.stat().st_size < whole.stat().st_size
    report = run(FakeEngine(), source, output)
    assert (report.complete, report.total) == (True, 400)
    assert rows_of(output) == rows_of(whole)


def test_ctrl_c_drains_and_says_how_to_go_on(tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 400)
    process = start(tmp_path)
    output = tmp_path / "out.jsonl"
    while not output.exists() or output.stat().st_size == 0:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Stopping: the rows that run will be finished" in told
    assert b"to go on: run it again" in told
    assert b"rows are left" in printed


def make_report(**changes: Any) -> JobReport:
    stages = (StageTimes(0, 10.0, 6.0, 1.0, 20 * 10**9, 10**10), StageTimes(1, 0.0, 0.0, 0.0, 0, 0))
    values: dict[str, Any] = {
        "output": Path("out.jsonl"),
        "quarantine": Path("out.errors.jsonl"),
        "total": 100,
        "answered": 39,
        "quarantined": 1,
        "resumed": 20,
        "running": 4,
        "stopping": False,
        "seconds": 10.0,
        "work": Work(50, 30, 200, 10.0, 9.0, stages),
        **changes,
    }
    return JobReport(**values)


def test_the_status_line() -> None:
    meter = Meter()
    line = status_line(make_report(), meter.update(make_report()))
    assert line == (
        "40/100 rows, 1 quarantined, 4 running, 20.0 tokens/s, 90% of the bound, "
        "NVMe 2.00 GB/s, PCIe 3.00 GB/s, 30s left"
    )
    later = make_report(
        seconds=12.0, work=Work(60, 30, 260, 12.0, 10.0, make_report().work.stages), stopping=True
    )
    line = status_line(later, meter.update(later))
    assert "30.0 tokens/s, 50% of the bound, stopping" in line
    assert line.endswith("stopping: finishing the rows that run")


def test_the_final_table_says_what_guesses_brought() -> None:
    drafts = DraftCounts(decodes=100, tokens=183, drafts=1300, accepted=83)
    work = replace(make_report().work, drafts=drafts)
    assert work.since(work).drafts == DraftCounts()
    console = Console(file=StringIO(), width=80)
    console.print(final_table(make_report(work=work), SETTING))
    assert isinstance(console.file, StringIO)
    said = "1.83 tokens a sequence and pass; 6% of 1,300 guesses were right"
    assert said in console.file.getvalue()


def test_the_final_table() -> None:
    console = Console(file=StringIO(), width=80)
    console.print(final_table(make_report(), SETTING))
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "39 of 100 answered, 1 quarantined, 20 of them by earlier runs" in text
    assert "guesses" not in text
    assert "…" not in text
    told = " ".join(text.split("Where the time went")[1].split("\n\n")[-1].split())
    assert "The model takes 9.00 MiB; 2 stages had 4.00 MiB each for weights, KV and work" in told
    assert "every pass streamed 4.00 MiB from NVMe and 1.00 MiB from host memory." in told
    assert "20 rows and 200 tokens took 10s. By the plan reading from NVMe sets the pace" in told
    assert "at most 8.0 tokens/s with 4 sequences at a time; passes reached 90%" in told
    assert "90%" in text
    for row in (
        "computing 3.0s 30% 0.0s 0%",
        "wait for weights 6.0s 60% 0.0s 0%",
        "wait for link 1.0s 10% 0.0s 0%",
        "between passes 0.0s 0% 10.0s 100%",
        "from NVMe 18.6 GiB 0 B GB/s 2.00 0.00",
        "from host RAM 9.31 GiB 0 B GB/s 1.00 0.00",
    ):
        assert row in cells_of(text)
    assert "matmul" not in text


def test_a_trace_splits_what_was_computed() -> None:
    assert (
        "computing 3.0s 30% 0.0s 0% dequant 0.5s 5% - matmul 1.5s 15% - attention 0.2s 2% - "
        "other 0.8s 8% -"
    ) in table_of(make_report(), [ComputeSplit(0.5, 1.5, 0.25), None])


def test_graphs_have_a_row_where_there_are_any() -> None:
    text = table_of(make_report(), [ComputeSplit(0.0, 0.5, 0.0, 2.0), None])
    assert "attention 0.0s 0% - CUDA graphs 2.0s 20% - other 0.5s 5% -" in text


def test_experts_have_rows_of_their_own() -> None:
    stages = (
        StageTimes(0, 10.0, 6.0, 1.0, 10**9, 0, 4000, 1000),
        StageTimes(1, 10.0, 6.0, 1.0, 0, 0),
    )
    report = make_report(work=Work(50, 30, 200, 10.0, 9.0, stages))
    console = Console(file=StringIO(), width=80)
    console.print(stage_table(report, expert_bytes=1 << 20))
    assert isinstance(console.file, StringIO)
    text = cells_of(console.file.getvalue())
    assert "experts reached 4,000 0 on the device 75% - loaded 1000 MiB 0 B" in text
    split = replace(PLAN, nvme_bytes_a_pass=(0, 0), host_bytes_a_pass=(0, 0), expert_slots=(8, 8))
    console.print(final_table(report, replace(SETTING, plan=split)))
    told = " ".join(console.file.getvalue().split())
    assert "every pass streamed experts as tokens reached them." in told


def test_moved_pages_have_rows_of_their_own() -> None:
    stages = (
        StageTimes(0, 10.0, 6.0, 1.0, 0, 0, kv_wait=2.0, kv_out_bytes=1 << 30),
        StageTimes(1, 10.0, 6.0, 1.0, 0, 0, kv_in_bytes=1 << 20),
    )
    text = table_of(make_report(work=Work(50, 30, 200, 10.0, 9.0, stages)), ())
    assert "computing 1.0s 10% 3.0s 30%" in text
    assert "wait for KV 2.0s 20% 0.0s 0%" in text
    assert "KV to host RAM 1.00 GiB 0 B GB/s 0.11 0.00" in text
    assert "KV from host RAM 0 B 1.00 MiB GB/s 0.00 0.00" in text
    assert "KV" not in " ".join(table_of(make_report(), ()).split("The model")[0].split())


def test_many_stages_stay_within_eighty_columns() -> None:
    stages = tuple(
        StageTimes(i, 10.0, 6.0, 1.0, 10**9, 0, kv_wait=1e5, kv_out_bytes=1000, kv_in_bytes=10**12)
        for i in range(9)
    )
    report = make_report(seconds=2e5, work=Work(50, 30, 200, 10.0, 9.0, stages))
    console = Console(file=StringIO(), width=200)
    console.print(stage_table(report))
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("wait for weights") == 3
    assert "stage 8" in cells_of(text)


def test_the_table_says_that_the_ring_changed() -> None:
    last = Work(10, 0, 40, 4.0, 3.0, (StageTimes(0, 4.0, 1.0, 0.0, 8 * 10**9, 0),), moves=0)
    text = table_of(make_report(work=replace(last, moves=1), last_ring=RingWork(last, 5.0)), ())
    assert "planned anew for 1: what stages did and streamed is of the last 5s" in text
    assert "between passes 1.0s 20%" in text and "1.60 GB/s" in text
    assert "planned anew" not in table_of(make_report(), ())


def table_of(report: JobReport, splits: Sequence[ComputeSplit | None]) -> str:
    console = Console(file=StringIO(), width=80)
    console.print(final_table(report, SETTING, splits))
    assert isinstance(console.file, StringIO)
    return cells_of(console.file.getvalue())


def cells_of(text: str) -> str:
    return " ".join("".join(" " if letter in "│┃" else letter for letter in text).split())


def test_a_terminal_gets_a_bar(tmp_path: Path, source: Path) -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=150)
    job = make_job(FakeEngine(pass_seconds=0.02), source, tmp_path / "out.jsonl")
    assert run_job(job, lambda: SETTING, console, resume_command="again") == 3
    assert "/40 rows" in screen.getvalue()
    assert "12 rows could not run" in screen.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (0, 42, 185, 7620)] == ["0s", "42s", "3m 05s", "2h 07m"]


def main() -> int:
    folder = Path(sys.argv[1])
    job = make_job(FakeEngine(pass_seconds=0.002), folder / "in.jsonl", folder / "out.jsonl")
    return run_job(job, lambda: SETTING, Console(), resume_command="run it again")


if __name__ == "__main__":
    sys.exit(main())
