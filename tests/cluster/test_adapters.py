"""Adapters over stages that are Ray actors, which die or are replaced, and in batch jobs."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from adapters import many_adapters, merged_tokens, stories_adapters
from commands import Refused
from ray_engines import ray_engine
from rings import manual_plan
from stored import tiny_store

from headrace.cluster.adapters import (
    Adapters,
    check_adapter_options,
    opened_adapters,
    parse_adapters,
)
from headrace.cluster.bench.local import local_engine
from headrace.cluster.engine import Engine
from headrace.cluster.engine_options import EngineOptions
from headrace.cluster.job_files import JobAdapters, JobFiles
from headrace.cluster.jobs import Job
from headrace.runtime.store import Store
from headrace.scheduler.errors import HeadraceError, JobError, RequestError
from headrace.scheduler.plan import Adapter
from headrace.scheduler.request import SamplingParams

TOKENS = 10
GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)


def run(
    engine: Engine, prompts: list[list[int]], names: list[str | None], kill: int | None
) -> list[list[int]]:
    """What each prompt is continued with, and stage 1 dies after so many steps."""
    ids = [
        engine.add(prompt, GREEDY, 0, adapter=name)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    done: dict[int, list[int]] = {}
    steps = 0
    while len(done) < len(ids):
        for completion in engine.step():
            assert completion.error is None
            done[completion.request_id] = completion.token_ids
        steps += 1
        if steps == kill:
            os.kill(engine.stage_pids()[1], signal.SIGKILL)
    return [done[number] for number in ids]


@pytest.mark.slow
def test_stages_that_die_or_are_replaced_load_their_adapters_again(
    ray_here: None, tmp_path: Path
) -> None:
    store, paths = tiny_store("llama", tmp_path), many_adapters("llama", tmp_path, 4)
    chance = random.Random(2)
    prompts = [[chance.randrange(3, 250) for _ in range(20 + 9 * i)] for i in range(5)]
    names = [None, "0", "1", "2", "3"]
    said = [
        merged_tokens("llama", path, [prompt], TOKENS)[0]
        for path, prompt in zip([None, *paths], prompts, strict=True)
    ]
    plan = manual_plan(Store.open(store), stages=2, num_pages=40, adapter_slots=3, ahead=1)
    with ray_engine(store, plan) as engine:
        engine.load_adapters({str(i): path for i, path in enumerate(paths)})
        with pytest.raises(HeadraceError, match="there is an adapter '0' already"):
            engine.load_adapters({"0": paths[0]})
        with pytest.raises(RequestError, match="no adapter 'x' here; there is 0, 1, 2, 3"):
            engine.add(prompts[0], GREEDY, 0, adapter="x")
        assert run(engine, prompts, names, kill=None) == said
        assert run(engine, prompts, names, kill=6) == said
        assert engine.stats.num_recoveries == 1
        engine.replace_stage(0)
        assert run(engine, prompts, names, kill=None) == said
        engine.remove_adapter("1")
        with pytest.raises(RequestError, match="no adapter '1' here; there is 0, 2, 3"):
            engine.add(prompts[0], GREEDY, 0, adapter="1")


def test_rows_of_a_job_name_adapters(stories: Path, tmp_path: Path) -> None:
    """By name or as their model; the others run with the default; a row that names an unknown one is quarantined,
    and a job is not gone on with when an adapter is another one."""
    named = stories_adapters(tmp_path)
    rows: list[dict[str, object]] = [
        {"id": 0, "prompt": "Once upon a time"},
        {"id": 1, "prompt": "Once upon a time", "adapter": "adapter-1"},
        {"id": 2, "prompt": "Once upon a time", "adapter": "nobody"},
        {
            "custom_id": "3",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": "Once upon a time", "model": "adapter-1"},
        },
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = EngineOptions(
        stories, device="cpu", device_memory=60 << 20, context=256, adapters=named, adapter_slots=1
    )
    check_adapter_options(options)
    defaults = SamplingParams(temperature=0.0, max_tokens=12)

    def files() -> JobFiles:
        chosen = JobAdapters.of(opened_adapters(options), "adapter-0")
        digest = Store.open(stories).digest
        return JobFiles(tmp_path / "in.jsonl", tmp_path / "out.jsonl", digest, defaults, chosen)

    with files() as opened, local_engine(options) as engine:
        Job(engine, engine.tokenizer, opened, model_name="m").run(lambda _: None)
        prompt = engine.tokenizer("Once upon a time")["input_ids"]
        said = [alone(engine, prompt, defaults, name) for name in (None, *named)]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    texts = {line["id"]: line["text"] for line in lines if "text" in line}
    assert texts == {0: said[1], 1: said[2]}
    assert len({*said}) == 3
    [batch] = [line["response"]["body"] for line in lines if line.get("custom_id") == "3"]
    assert batch["choices"][0]["text"] == said[2]
    told = json.loads((tmp_path / "out.errors.jsonl").read_text())["error"]
    assert told == "there is no adapter 'nobody' here; there is adapter-0, adapter-1"
    shutil.copytree(named["adapter-1"], named["adapter-0"], dirs_exist_ok=True)
    with pytest.raises(JobError, match="adapter"):
        files()


def alone(engine: Engine, prompt: list[int], params: SamplingParams, name: str | None) -> str:
    engine.add(prompt, params, 0, adapter=name)
    while True:
        for completion in engine.step():
            return completion.text


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stories_adapters(tmp_path_factory.mktemp("adapters"))["adapter-1"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--adapter", "a"], "--adapter must be NAME=DIR, not 'a'"),
        (["--adapter", "a=nowhere"], "the adapter nowhere is no directory"),
        (["--adapter", "a=."], "it has no adapter_config.json"),
        (["--adapter-host-memory", "1MiB"], "of no use without adapters"),
        (["--default-adapter", "a"], "there is no --adapter a=DIR"),
        (
            ["--adapter", "a={adapter}", "--adapter-rank", "2"],
            "--adapter-rank 2 is too little: the adapter a has rank 5; give 5 or more",
        ),
    ],
)
def test_mistakes_are_told_at_once(
    refused: Refused,
    stories: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    given = [each.format(adapter=adapter) for each in given]
    files = ["--input", "in.jsonl", "--output", "out.jsonl", "--device", "cpu"]
    assert told in refused("generate", stories, *files, *given)


A, B = Adapter("a", "/a"), Adapter("b", "/b")


def test_what_a_request_calls_its_model() -> None:
    named = Adapters({"a": A, "b": B})
    assert named.chosen(None, None) is None
    assert named.chosen(None, "anything") is None
    assert named.chosen(None, "a") == "a"
    assert named.chosen("a", "base") == "a"
    with pytest.raises(RequestError, match="give one of them"):
        named.chosen("a", "b")


def test_a_job_is_another_one_with_other_adapters() -> None:
    assert JobAdapters().parameters == {}
    one = JobAdapters.of(Adapters({"a": A}), "a")
    assert one.parameters != JobAdapters.of(Adapters({"a": B}), "a").parameters
    with pytest.raises(JobError, match="--default-adapter b: there is no --adapter b=DIR"):
        JobAdapters.of(Adapters({"a": A}), "b")


def test_options_name_adapters() -> None:
    assert parse_adapters(["a=/x", "b=y=z"]) == {"a": Path("/x"), "b": Path("y=z")}
    with pytest.raises(HeadraceError, match="--adapter must be NAME=DIR, not 'a'"):
        parse_adapters(["a"])
    with pytest.raises(HeadraceError, match="--adapter a is given twice"):
        parse_adapters(["a=x", "a=y"])
