"""Jobs that are killed: every id once, and the answers of a run that was not."""

import json
import random
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Command, headrace, wait_for
from rings import local_ring, manual_plan

from headrace.cluster.engine import Engine
from headrace.cluster.explain.explanation import explain
from headrace.cluster.explain.report import read_report
from headrace.cluster.job_files import JobFiles
from headrace.cluster.jobs import Job
from headrace.cluster.ring import Ring
from headrace.cluster.tokenizer import load_tokenizer, stop_ids
from headrace.runtime.store import Store
from headrace.scheduler.placement import Tier
from headrace.scheduler.request import SamplingParams

PROMPTS = Path(__file__).parents[2] / "examples" / "prompts.jsonl"
TEMPERATURE = 0.6


@dataclass(frozen=True)
class JobCase:
    """A job on the bundled model: the same command each time, in `folder`."""

    folder: Path
    store: Path
    rows: int
    max_tokens: int
    stages: int = 2

    def __post_init__(self) -> None:
        lines = PROMPTS.read_text().splitlines()[: self.rows]
        (self.folder / "in.jsonl").write_text("".join(line + "\n" for line in lines))

    def start(self, output: str = "out.jsonl") -> AbstractContextManager[Command]:
        return headrace(
            self.folder,
            *("generate", self.store, "--input", "in.jsonl", "--output", output),
            *("--stages", self.stages, "--device", "cpu", "--device-memory", "24MiB"),
            *("--host-memory", "0", "--context", "256", "--temperature", TEMPERATURE),
            # Few at once, so that rows are left to wait when a test looks.
            *("--max-tokens", self.max_tokens, "--max-sequences", 16),
        )

    def finish(self, output: str = "out.jsonl") -> dict[str, str]:
        """Run to the end; the answers by id, each of which must be there once."""
        with self.start(output) as command:
            assert command.wait(600.0) == 0, command.stderr
        return self.answers(output)

    def finish_here(self, output: str = "out.jsonl") -> dict[str, str]:
        """The same in this process: one stage that holds every layer, and no Ray."""
        store = Store.open(self.store)
        tokenizer, plan = load_tokenizer(self.store), manual_plan(store, tier=Tier.DEVICE)
        defaults = SamplingParams(temperature=TEMPERATURE, max_tokens=self.max_tokens)
        with (
            JobFiles(
                self.folder / "in.jsonl", self.folder / output, store.digest, defaults
            ) as files,
            local_ring(self.store, plan) as pipeline,
            Engine(
                Ring(plan, pipeline),
                tokenizer,
                stop_ids=stop_ids(store, tokenizer),
                digest=store.digest,
                dtype="float32",
            ) as engine,
        ):
            Job(engine, tokenizer, files, model_name=self.store.name).run(lambda _: None)
        return self.answers(output)

    def answers(self, output: str) -> dict[str, str]:
        lines = (self.folder / output).read_text().splitlines()
        answers = {json.loads(line)["id"]: line for line in lines}
        assert len(lines) == len(answers) == self.rows
        return answers

    def written(self) -> int:
        """Lines of the output, finished or not."""
        output = self.folder / "out.jsonl"
        return output.read_bytes().count(b"\n") if output.exists() else 0

    def wait_for_progress(self, command: Command, rows: int = 1) -> None:
        """Until the command has finished `rows` rows."""
        before = self.written()
        wait_for(
            lambda: self.written() >= before + rows or command.process.poll() is not None,
            120.0,
            lambda: f"no row was finished: {command.stderr}",
        )
        assert command.process.poll() is None, command.stdout + command.stderr

    def kill_driver(self, rows: int, delay: float) -> None:
        """Kill the driver `delay` seconds after it finished `rows` rows, or 0: after it started Ray.

        Nothing stays.
        """
        with self.start() as command:
            if rows:
                self.wait_for_progress(command, rows)
            else:
                wait_for(lambda: len(command.processes()) > 1, 60.0, lambda: command.stderr)
            time.sleep(delay)
            command.kill()

    def kill_stage(self, stage: int, rows: int, delay: float) -> None:
        """Kill one stage: the job says so and goes on with another one. Then kill the driver, too."""
        with self.start() as command:
            self.wait_for_progress(command, rows)
            time.sleep(delay)
            command.stage(stage).kill()
            wait_for(lambda: "recovered in" in command.stderr, 90.0, lambda: command.stderr)
            said = command.stderr
            assert f"stages {stage} replaced" in said
            assert "Traceback" not in said and "error:" not in said
            self.wait_for_progress(command)
            command.kill()

    def interrupt(self) -> None:
        """Ctrl-C: the rows that run are finished, those that only wait are left for the next run."""
        with self.start() as command:
            self.wait_for_progress(command)
            before = self.written()
            command.interrupt()
            assert command.wait(60.0) == 130, command.stderr
            said = " ".join((command.stdout + command.stderr).split())
            assert "Stopping: the rows that run will be finished. Again to give them up" in said
            assert "rows are left. Finished rows are safe; to go on: " in said
            assert "Traceback" not in said and "error" not in said
            wait_for(lambda: not command.processes(), 30.0, lambda: f"left: {command.processes()}")
        assert before < self.written() < self.rows
        left = read_report(self.folder / "out.jsonl")
        assert not left.finished and explain(left).plan.max_sequences == 16


@pytest.mark.timeout(600)
@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_job_that_is_killed_and_stopped_goes_on(
    stories: Path, tmp_path: Path, more: bool
) -> None:
    # Enough for some to be left when it is interrupted, on a fast machine, too: 48 took one 1.2 s.
    rows, stages = (250, 2) if more else (150, 1)
    case = JobCase(tmp_path, stories, rows, max_tokens=16, stages=stages)
    chance = random.Random(1)
    if more:
        case.kill_driver(0, chance.uniform(0.0, 3.0))
        case.kill_stage(1, chance.randint(1, 8), chance.uniform(0.0, 0.1))
    case.kill_driver(chance.randint(1, 8), chance.uniform(0.0, 0.1))
    case.interrupt()
    assert case.finish() == case.finish_here("whole.jsonl")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", ["driver", "stage"])
def test_ten_kills_lose_and_repeat_nothing(what: str, stories: Path, tmp_path: Path) -> None:
    case = JobCase(tmp_path, stories, rows=500, max_tokens=16)
    whole = case.finish("whole.jsonl")
    chance = random.Random(2)
    for kill in range(10):
        rows, delay = chance.randint(1, 25), chance.uniform(0.0, 0.1)
        if what == "stage":
            case.kill_stage(chance.randrange(2), rows, delay)
        elif kill % 5 == 4:
            case.kill_driver(0, chance.uniform(0.0, 5.0))  # while it starts
        else:
            case.kill_driver(rows, delay)
    assert case.written() < case.rows
    assert case.finish() == whole
