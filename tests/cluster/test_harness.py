"""A store as a model of lm-evaluation-harness, on tasks that are files here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import STORIES, python
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.runtime.conversion.convert import convert

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

STARTS = (
    ("Once upon a time, there was a little", [" girl", " tax"]),
    ("The dog was very", [" happy", " seventeen"]),
    ("They went to the park to", [" play", " of"]),
)


def instances(*arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, each, 0) for each in arguments]


@torch.no_grad()
def expected(model: Any, context: str, continuation: str) -> tuple[float, bool]:
    """By transformers; a text of its own follows the model's end of text."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    before = tokenizer(context).input_ids or [tokenizer.bos_token_id or tokenizer.eos_token_id]
    after = tokenizer(context + continuation).input_ids[len(tokenizer(context).input_ids) :]
    logs = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    rows = logs[len(before) - 1 : -1]
    log = rows.gather(1, torch.tensor(after)[:, None]).sum().item()
    return log, rows.argmax(-1).tolist() == after


def test_likelihoods_are_transformers() -> None:
    from headrace.cluster.evaluation.harness.model import HeadraceLM

    model = HeadraceLM(str(STORIES), device="cpu", max_length=64)
    reference = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    pairs = [(start, end) for start, ends in STARTS for end in ends]
    pairs += [("", "The sun was out."), (" ".join(["A cat."] * 12), " A cat.")]  # of unlike lengths
    found = model.loglikelihood(instances(*pairs), disable_tqdm=True)
    for (log, greedy), pair in zip(found, pairs, strict=True):
        wanted = expected(reference, *pair)
        assert log == pytest.approx(wanted[0], rel=1e-4) and greedy == wanted[1], pair
    assert any(greedy for _, greedy in found) and not all(greedy for _, greedy in found)
    [rolled] = model.loglikelihood_rolling(instances(("The sun was out.",)), disable_tqdm=True)
    assert rolled == pytest.approx(expected(reference, "", "The sun was out.")[0], rel=1e-4)


CHOICES = """
task: starts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/starts.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{start}}"
doc_to_choice: "{{ends}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""

WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/starts.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{said}}"
target_delimiter: ""
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.slow
def test_tasks_run_from_the_harness_command_line(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    lines = []
    for start, ends in STARTS:
        ids = tokenizer(start, return_tensors="pt").input_ids
        said = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(said, skip_special_tokens=True).split("\n")[0]
        lines.append(json.dumps({"start": start, "ends": ends, "said": text}))
    (tmp_path / "starts.jsonl").write_text("\n".join(lines))
    for name, task in (("starts", CHOICES), ("writing", WRITING)):
        (tmp_path / f"{name}.yaml").write_text(task.replace("FOLDER", str(tmp_path)))
    store = convert(STORIES, tmp_path / "store", format="keep").path
    arguments = [
        *("--model", "headrace", "--model_args", f"store={store},device_memory=1GiB"),
        *("--device", "cpu", "--include_path", tmp_path, "--tasks", "starts,writing"),
        *("--output_path", tmp_path / "out"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    module = "headrace.cluster.evaluation.harness"
    with python(tmp_path, "-m", module, "run", *arguments, **offline) as command:
        assert command.wait(170) == 0, command.stderr[-3000:]
    [file] = (tmp_path / "out").rglob("results*.json")
    results = json.loads(file.read_text())["results"]
    assert results["starts"]["acc,none"] == 1.0
    assert results["writing"]["exact_match,none"] == 1.0
