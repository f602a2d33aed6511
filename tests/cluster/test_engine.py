"""The engine on real Ray actors, through the library's front door."""

import itertools
import json
import shutil
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from architectures import greedy, tiny_model
from commands import STORIES
from rich.console import Console

from headrace import LLM, SamplingParams, StructuredOutputsParams
from headrace.cluster.cli.generate import Setting, run_job
from headrace.cluster.job_files import JobFiles
from headrace.cluster.jobs import Job
from headrace.cluster.trace_summary import summarize
from headrace.runtime.conversion.convert import convert
from headrace.runtime.store import Store
from headrace.scheduler.errors import DoesNotFitError, HeadraceError, RequestError
from headrace.scheduler.placement import Tier
from headrace.scheduler.plan import MoveKind

ROOM = {"device": "cpu", "host_memory": 0, "context": 256}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
ONCE = "Once upon a time, there was a"

RINGS = list(itertools.product(("cyclic", "contiguous"), (None, 0)))
"""Placement, and how many layers stay on each of two stages (None: all)."""

pytestmark = pytest.mark.usefixtures("ray_here")

NAMES = ("llama", "qwen3_moe", "gpt_oss", "gemma3_text")


@pytest.fixture(scope="module")
def llm(ray_here: None, stories: Path) -> Iterator[LLM]:
    """Two stages that stream half of the bundled model."""
    with LLM(stories, stages=2, device_memory="8MiB", resident_layers=3, **ROOM) as engine:
        assert any(engine.plan.nvme_bytes_a_pass)
        yield engine


def test_answers_of_a_form_from_two_stages(llm: LLM) -> None:
    form = StructuredOutputsParams(choice=["a big dog", "a small cat"])
    params = SamplingParams(max_tokens=20, seed=1, structured_outputs=form)
    forced = SamplingParams(max_tokens=3, temperature=0.0, logit_bias={5: 100.0})
    bound, free = llm.generate([ONCE, ONCE], [params, forced])
    assert bound.outputs[0].text in ("a big dog", "a small cat")
    assert bound.outputs[0].finish_reason == "stop"
    assert free.outputs[0].token_ids == [5, 5, 5]
    wrong = StructuredOutputsParams(regex="(")
    with pytest.raises(RequestError, match="regex"):
        llm.generate(ONCE, SamplingParams(structured_outputs=wrong))
    with pytest.raises(RequestError, match="no place for tools"):
        llm.chat([{"role": "user", "content": "Hi"}], tools=[{"type": "function"}])


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", ["int8", "int4"])
def test_quantized_pages_give_the_same_on_one_stage_and_on_two(
    stories: Path, kv_format: str
) -> None:
    prompts = [ONCE * 12, "The sun was", ONCE * 20]
    in_host: dict[str, Any] = {"host_memory": "3MiB", "kv_host_memory": "2MiB"}
    found = []
    for room in (
        {"stages": 2, "device_memory": "8MiB", "resident_layers": 3, "token_budget": 50},
        {"device_memory": "60MiB", "resident_layers": 12} | in_host,
    ):
        with LLM(stories, kv_format=kv_format, **(ROOM | room)) as llm:
            assert (llm.plan.host_pages > 0) == ("kv_host_memory" in room)
            assert llm.plan.kv_format == kv_format and llm.plan.num_tails > 0
            found.append([output.outputs[0] for output in llm.generate(prompts, GREEDY)])
    assert found[0] == found[1]


def test_a_kv_format_that_there_is_not(stories: Path) -> None:
    with pytest.raises(HeadraceError, match="--kv-format must be auto, bf16, int8 or int4, not"):
        LLM(stories, kv_format="fp8", **ROOM)


def test_generate_in_the_order_of_the_prompts(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    ids = tokenizer("The sun was")["input_ids"]
    outputs = llm.generate([ONCE, ids, "A dog"], [GREEDY, GREEDY, SamplingParams(max_tokens=3)])
    assert [output.prompt for output in outputs] == [ONCE, None, "A dog"]
    assert outputs[1].prompt_token_ids == ids
    assert [len(output.outputs[0].token_ids) for output in outputs[:2]] == [24, 24]
    first = outputs[0].outputs[0]
    assert first.finish_reason == "length" and first.logprobs is None
    assert first.text == tokenizer.decode(first.token_ids, skip_special_tokens=True)
    assert llm.generate(ONCE, GREEDY)[0].outputs[0] == first


def test_chat(llm: LLM) -> None:
    asked = [{"role": "user", "content": "Tell me a story about a cat."}]
    one, two = llm.chat([asked, asked], GREEDY)
    assert one.outputs[0].text == two.outputs[0].text != ""
    assert llm.chat(asked, GREEDY)[0].outputs[0] == one.outputs[0]


@pytest.mark.slow
def test_a_conversation_goes_on_from_kept_pages(stories: Path, tmp_path: Path) -> None:
    room = ROOM | {"host_memory": "40MiB", "device_memory": "60MiB", "kv_host_memory": "4MiB"}
    tiers = {"kv_directory": str(tmp_path / "kv"), "kv_disk": "64MiB", "kv_ttl": "1h"}
    with LLM(stories, **room, **tiers) as llm:
        (first,) = llm.generate(ONCE * 12, GREEDY, keep_context=True)
        tokens = first.prompt_token_ids + first.outputs[0].token_ids
        (second,) = llm.generate([[*tokens, 5, 6, 7]], GREEDY, keep_context=True)
        assert llm.stats.kv.hits.total == (len(tokens) - 1) // 64 > 0
        assert llm.stats.kv.moved[MoveKind.OUT]
    assert not any((tmp_path / "kv").iterdir())
    with LLM(stories, **room) as llm:
        assert llm.generate([[*tokens, 5, 6, 7]], GREEDY)[0].outputs == second.outputs


@pytest.mark.slow
def test_a_stage_moves_to_another_process_between_calls(stories: Path, tmp_path: Path) -> None:
    room = ROOM | {"host_memory": "40MiB", "device_memory": "60MiB", "kv_host_memory": "4MiB"}
    tiers = {"kv_directory": str(tmp_path / "kv"), "kv_disk": "64MiB"}
    with LLM(stories, stages=2, trace=tmp_path / "trace.json", **room, **tiers) as llm:
        (first,) = llm.generate(ONCE * 12, GREEDY, keep_context=True)
        tokens = first.prompt_token_ids + first.outputs[0].token_ids
        for stage in range(2):
            moved = llm.replace_stage(stage)
            assert (moved.stage, moved.lost) == (stage, 0) and moved.pages and moved.nbytes
        (second,) = llm.generate([[*tokens, 5, 6, 7]], GREEDY)
        assert llm.stats.kv.hits.device == (len(tokens) - 1) // 64 > 0
        with pytest.raises(HeadraceError, match="there is no stage 2"):
            llm.replace_stage(2)
    with LLM(stories, **room) as llm:
        assert llm.generate([[*tokens, 5, 6, 7]], GREEDY)[0].outputs == second.outputs
    told = summarize(tmp_path / "trace.json")
    left = [f"stage {stage} (process {stage + 1} that left)" for stage in range(2)]
    assert set(told.nodes) == {"driver", "stage 0", "stage 1", *left}
    assert all(told.spans[process]["pass"] for process in left)
    assert told.spans["driver"]["replace a stage"] == 2 and told.notes == ()


def test_samples_of_one_prompt(llm: LLM) -> None:
    params = SamplingParams(n=2, temperature=1.0, max_tokens=12, seed=3, ignore_eos=True)
    first, second = llm.generate(ONCE, params)[0].outputs
    assert (first.index, second.index) == (0, 1)
    assert first.token_ids != second.token_ids
    assert [o.token_ids for o in llm.generate(ONCE, params)[0].outputs] == [
        first.token_ids,
        second.token_ids,
    ]


def test_stopping(llm: LLM) -> None:
    whole = llm.generate(ONCE, GREEDY)[0].outputs[0]
    word = whole.text.split()[3]
    (cut,) = llm.generate(ONCE, SamplingParams(temperature=0.0, max_tokens=24, stop=(word,)))
    assert cut.outputs[0].text == whole.text[: whole.text.index(word)]
    assert cut.outputs[0].finish_reason == "stop"
    token = whole.token_ids[5]
    at = whole.token_ids.index(token)
    params = SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=(token,))
    (ended,) = llm.generate(ONCE, params)
    assert ended.outputs[0].token_ids == whole.token_ids[: at + 1]
    assert ended.outputs[0].finish_reason == "stop"


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=3, ignore_eos=True)
    (output,) = llm.generate(ONCE, params)[0].outputs
    assert output.logprobs is not None
    assert [sample.token for sample in output.logprobs] == output.token_ids
    for sample in output.logprobs:
        assert sample.logprob is not None and sample.logprob <= 0
        assert len(sample.top) == 3
        assert sample.top[0] == (sample.token, sample.logprob)  # greedy takes the likeliest


def test_a_prompt_beyond_the_context_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="holds at most"):
        llm.generate([[5] * (llm.plan.max_context + 1)], GREEDY)
    assert llm.generate(ONCE, GREEDY)[0].outputs[0].text


def test_abort(llm: LLM) -> None:
    engine = llm._engine
    kept = engine.add([5, 6, 7], GREEDY, seed=1)
    started, waiting = (engine.add([5, 6, last], GREEDY, seed=1) for last in (8, 9))
    assert not engine.has_started(kept)
    done = []
    while not engine.has_started(started):
        done += engine.step()
    for request_id in (started, waiting, waiting):
        engine.abort(request_id)
    while engine.has_work:
        done += engine.step()
    assert [completion.request_id for completion in done] == [kept]


@pytest.mark.slow
def test_seeds_give_the_same_on_other_rings(llm: LLM, stories: Path) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=20, seed=11)
    prompts = [ONCE, "A dog", "The old man"]
    two = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    with LLM(stories, device_memory="60MiB", resident_layers=12, **ROOM) as alone:
        assert set(alone.plan.placement.tiers) == {Tier.DEVICE}
        one = [output.outputs[0].token_ids for output in alone.generate(prompts, params)]
    assert one == two


def test_a_job_with_bad_rows(llm: LLM, stories: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [json.dumps({"id": "good", "prompt": ONCE}), '{"id": "torn", "prom']
    rows += [json.dumps({"id": "long", "prompt": "word " * 2000})]
    rows += [json.dumps({"id": "odd", "prompt": ONCE, "speed": 9})]
    source.write_text("\n".join(rows))
    store, console = Store.open(stories), Console(file=StringIO(), width=200)
    with JobFiles(source, output, store.digest, SamplingParams(max_tokens=8)) as files:
        job = Job(llm._engine, llm.get_tokenizer(), files, model_name="stories")
        setting = Setting(llm.plan, store.nbytes, 8 << 20)
        assert run_job(job, lambda: setting, console, resume_command="again") == 3
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == ["good"]
    said = console.file.getvalue()
    assert "3 rows could not run: see" in said and "every pass streamed" in said
    errors = (tmp_path / "out.errors.jsonl").read_text().splitlines()
    reasons = {row["line"]: row["error"] for row in map(json.loads, errors)}
    assert "not valid JSON" in reasons[2]
    assert "shorten it or raise --context" in reasons[3]
    assert "speed" in reasons[4]


def test_a_model_that_does_not_fit_leaves_ray_usable(stories: Path) -> None:
    with pytest.raises(DoesNotFitError, match="needs at least"):
        LLM(stories, stages=1, device_memory="1MiB", **ROOM)


def check_ring(name: str, folder: Path, placement: str, resident: int | None) -> None:
    model = tiny_model(name)
    model.save_pretrained(folder / "checkpoint")
    for file in STORIES.glob("tokenizer*"):
        shutil.copy(file, folder / "checkpoint")
    store = convert(folder / "checkpoint", folder / "store", format="keep").path
    prompts = [[3 + (7 * i + j) % 250 for j in range(n)] for i, n in enumerate((1, 9, 33, 70))]
    wanted = [greedy(model, prompt, 24) for prompt in prompts]
    room: dict[str, Any] = ROOM | {"device_memory": "64MiB", "resident_layers": resident}
    with LLM(store, stages=2, placement=placement, **room) as llm:
        where = llm.plan.placement
        assert where.tiers.count(Tier.NVME) == (0 if resident is None else where.num_layers)
        got = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    assert got == wanted


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ring"), [("gemma3_text", RINGS[3])])
def test_greedy_equals_transformers(
    name: str, ring: tuple[str, int | None], tmp_path: Path
) -> None:
    check_ring(name, tmp_path, *ring)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ring", RINGS)
def test_greedy_equals_transformers_on_every_ring(
    name: str, ring: tuple[str, int | None], tmp_path: Path
) -> None:
    check_ring(name, tmp_path, *ring)
