"""Answers beside a reference: which tokens count, and which have strayed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from architectures import tiny_model
from stored import tiny_store
from transformers import AutoModelForCausalLM

from headrace.runtime.conversion.convert import convert
from headrace.runtime.evaluation.answers import Answer, AnswerFigures
from headrace.runtime.evaluation.compare import compare_answers
from headrace.runtime.sweep.source import open_model
from headrace.runtime.sweep.sweep import Sweep

CONTEXT = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store("llama", tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with larger weights."""
    folder = tmp_path_factory.mktemp("other")
    model = tiny_model("llama")
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.mul_(1.3)
    model.save_pretrained(folder / "changed")
    convert(folder / "changed", folder / "store", format="keep", allow_missing_tokenizer=True)
    return folder / "store"


@contextmanager
def swept(path: Path) -> Iterator[Sweep]:
    with Sweep(open_model(path), torch.device("cpu"), torch.float32, context=CONTEXT) as sweep:
        yield sweep


def compared(reference: Path, served: Path, answers: list[Answer]) -> AnswerFigures:
    with swept(reference) as beside, swept(served) as own:
        return compare_answers(beside, own, answers, CONTEXT, 1e-3, lambda *_: None)


def greedy(model: AutoModelForCausalLM, prompt: list[int], new: int) -> Answer:
    made = model.generate(
        torch.tensor([prompt]), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    return Answer(tuple(made[0].tolist()), len(prompt), greedy=True)


def test_greedy_answers_of_transformers_stray_from_no_store_of_its_own(
    store: Path, other: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(store, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    answers = [greedy(model, [5, 9, 70], 20), greedy(model, [33], 9)]
    same = compared(store, store, answers)
    assert (same.tokens, same.greedy_tokens, same.sequences) == (29, 29, 2)
    assert (same.strayed, same.strayed_from_reference) == (0, 0)
    assert same.kld_mean == 0 and same.top1 == 1
    assert same.perplexity == same.reference_perplexity
    far = compared(other, store, answers)
    assert far.strayed == 0 < far.strayed_from_reference
    assert far.kld_mean > 0 and far.top1 < 1
    assert compared(store, other, answers).strayed == far.strayed_from_reference


def test_tokens_that_a_ring_got_wrong_are_counted_and_drawn_ones_are_not(store: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(store, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    right = greedy(model, [5, 9, 70], 20)
    wrong = Answer((*right.tokens[:-1], right.tokens[-1] ^ 1), 3, greedy=True)
    drawn = Answer(wrong.tokens, 3, greedy=False)
    found = compared(store, store, [wrong, drawn])
    assert (found.tokens, found.greedy_tokens, found.strayed) == (40, 20, 1)


def test_figures_are_of_the_answers_tokens_alone(store: Path, other: Path) -> None:
    tokens = torch.randint(4, 256, (3, 40), generator=torch.Generator().manual_seed(2))
    ends, prompts = (40, 31, 12), (10, 30, 1)
    rows = zip(tokens.tolist(), ends, prompts, strict=True)
    found = compared(
        store, other, [Answer(tuple(row[:end]), prompt, greedy=False) for row, end, prompt in rows]
    )
    logs = []
    for path in (store, other):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logs.append(model(tokens).logits.double().log_softmax(-1))
    each = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    rows_of = [
        each[i, p - 1 : end - 1] for i, (p, end) in enumerate(zip(prompts, ends, strict=True))
    ]
    expected = torch.cat(rows_of)
    assert found.tokens == len(expected) == 30 + 1 + 11
    assert found.kld_mean == pytest.approx(expected.mean().item(), rel=1e-3)
    assert found.kld_p99 == pytest.approx(expected.quantile(0.99).item(), rel=1e-3)
