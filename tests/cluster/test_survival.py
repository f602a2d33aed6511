"""Jobs that are killed: every id once, and the answers of a run that was not."""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Command, headrace, wait_for

PROMPTS = Path(__file__).parents[2] / "examples" / "prompts.jsonl"


@dataclass(frozen=True)
class JobCase:
    """A job on the bundled model: the same command each time, in `folder`."""

    folder: Path
    store: Path
    rows: int
    max_tokens: int

    def __post_init__(self) -> None:
        lines = PROMPTS.read_text().splitlines()[: self.rows]
        (self.folder / "in.jsonl").write_text("".join(line + "\n" for line in lines))

    def start(self, output: str = "out.jsonl", stages: int = 2):
        return headrace(
            self.folder,
            *("generate", self.store, "--input", "in.jsonl", "--output", output),
            *("--stages", stages, "--device", "cpu", "--device-memory", "24MiB"),
            *("--host-memory", "0", "--context", "256", "--temperature", "0.6"),
            *("--max-tokens", self.max_tokens),
        )

    def finish(self, output: str = "out.jsonl", stages: int = 2) -> dict[str, str]:
        """Run to the end; the answers by id, each of which must be there once."""
        with self.start(output, stages) as command:
            assert command.wait(600.0) == 0, command.stderr
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
        """Kill the driver `delay` seconds after it finished `rows` rows; nothing stays."""
        with self.start() as command:
            if rows:
                self.wait_for_progress(command, rows)
            time.sleep(delay)
            command.kill()

    def kill_stage(self, stage: int, rows: int, delay: float) -> None:
        """Kill one stage: the driver says which one and how to go on, and leaves nothing."""
        with self.start() as command:
            self.wait_for_progress(command, rows)
            time.sleep(delay)
            command.stage(stage).kill()
            assert command.wait(30.0) == 1
            said = command.stderr
            assert f"stage {stage} died" in said
            assert "Finished rows are safe; to go on: " in said
            assert f"generate {self.store} --input in.jsonl" in said
            assert "Traceback" not in said
            assert said.count("error:") == 1
            wait_for(lambda: not command.processes(), 30.0, lambda: f"left: {command.processes()}")


@pytest.mark.timeout(300)
def test_a_killed_job_goes_on(stories: Path, tmp_path: Path) -> None:
    case = JobCase(tmp_path, stories, rows=40, max_tokens=16)
    chance = random.Random(1)
    case.kill_driver(0, chance.uniform(1.0, 5.0))
    case.kill_driver(chance.randint(1, 8), chance.uniform(0.0, 0.1))
    case.kill_stage(1, chance.randint(1, 8), chance.uniform(0.0, 0.1))
    assert case.written() > 0
    assert case.finish() == case.finish("whole.jsonl", stages=1)


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


@pytest.mark.timeout(300)
def test_ctrl_c_finishes_what_runs(stories: Path, tmp_path: Path) -> None:
    case = JobCase(tmp_path, stories, rows=60, max_tokens=32)
    with case.start() as command:
        case.wait_for_progress(command)
        before = case.written()
        command.interrupt()
        assert command.wait(60.0) == 130, command.stderr
        said = " ".join((command.stdout + command.stderr).split())
        assert "Stopping: the rows that run will be finished. Again to give them up" in said
        assert "rows are left. Finished rows are safe; to go on: " in said
        assert "Traceback" not in said and "error" not in said
        wait_for(lambda: not command.processes(), 30.0, lambda: f"left: {command.processes()}")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert case.written() > before
    assert 0 < len(lines) < 40  # rows that only waited are left for the next run
