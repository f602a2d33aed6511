"""Perplexity, divergence and greedy continuations by sweeps, compared with transformers'."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import greedy, tiny_model
from commands import STORIES
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.runtime.conversion.convert import convert
from headrace.runtime.evaluation.figures import (
    divergence_figures,
    octaves,
    perplexity,
    worst_windows,
)
from headrace.runtime.evaluation.greedy import continue_greedily
from headrace.runtime.evaluation.measure import Predictions, measure
from headrace.runtime.evaluation.windows import Windows, cut_windows
from headrace.runtime.sweep.source import open_model
from headrace.runtime.sweep.sweep import Sweep

CPU = torch.device("cpu")
TEXT = STORIES.parent / "text" / "held_out_stories.txt"


def silent(*_: object) -> None:
    """Reports go nowhere."""


def measured(windows: Windows, *paths: Path) -> list[Predictions]:
    sweeps = [
        Sweep(open_model(path), CPU, torch.float32, context=windows.context) for path in paths
    ]
    try:
        return measure(sweeps, windows, silent)
    finally:
        for sweep in sweeps:
            sweep.close()


@torch.no_grad()
def full_logits(model: Any, windows: Windows) -> list[Tensor]:
    """Each window's alone, without padding, but for those after its last token."""
    rows = zip(windows.tokens, windows.lengths, strict=True)
    return [model(row[None, :length]).logits[0, :-1].double() for row, length in rows]


def targets(windows: Windows) -> list[Tensor]:
    return [row[1:n] for row, n in zip(windows.tokens, windows.lengths, strict=True)]


def test_perplexity_is_transformers(tmp_path: Path) -> None:
    ids = AutoTokenizer.from_pretrained(STORIES)(TEXT.read_text()[:6000]).input_ids
    windows = cut_windows([ids], [], 512)
    assert windows is not None and len(set(windows.lengths)) == 2  # the last one is shorter
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    logits, wanted = torch.cat(full_logits(model, windows)), torch.cat(targets(windows))
    expected = math.exp(torch.nn.functional.cross_entropy(logits, wanted).item())
    convert(STORIES, tmp_path / "kept", format="keep")
    for path in (STORIES, tmp_path / "kept"):
        [found] = measured(windows, path)
        assert perplexity(windows, found) == pytest.approx(expected, rel=1e-4)


def test_divergence_is_that_of_full_logits(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "other")
    ids = torch.randint(4, 256, (230,)).tolist()
    windows = cut_windows([ids[:150], ids[150:]], [1], 64)
    assert windows is not None and windows.lengths == (64, 64, 25, 64, 18)
    reference, found = measured(windows, tmp_path / "one", tmp_path / "other")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("one", "other")]
    logs = [torch.cat(full_logits(m, windows)).log_softmax(-1) for m in models]
    expected = torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="none").sum(
        -1
    )
    figures = divergence_figures(windows, reference, found)
    assert figures.mean == pytest.approx(expected.mean().item(), rel=1e-4)
    assert figures.max == pytest.approx(expected.max().item(), rel=1e-4)
    assert figures.p99 == pytest.approx(expected.quantile(0.99).item(), rel=1e-4)
    assert sum(count for _, count in figures.histogram) == windows.count == len(expected)
    assert figures.top1 == (logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean().item()
    _check_positions(windows, reference, found, expected)
    _check_layers(windows, models, found)


def _check_positions(
    windows: Windows, reference: Predictions, found: Predictions, expected: Tensor
) -> None:
    buckets = list(octaves(windows, reference, found))
    assert [(o.first, o.last) for o in buckets] == [
        (1, 1),
        (2, 3),
        (4, 7),
        (8, 15),
        (16, 31),
        (32, 63),
    ]
    assert [o.tokens for o in buckets] == [5, 10, 20, 40, 16 * 3 + 9 + 2, 32 * 3]
    first = expected[torch.tensor([0, 63, 126, 150, 213])]  # the first of each window
    assert buckets[0].kld == pytest.approx(first.mean().item(), rel=1e-4)
    worst = worst_windows(windows, found, 2, 10)
    means = [piece.mean().item() for piece in expected.split([63, 63, 24, 63, 17])]
    assert [w.kld for w in worst] == pytest.approx(sorted(means, reverse=True)[:2], rel=1e-4)
    assert all(w.last - w.first == 10 for w in worst)


def _check_layers(windows: Windows, models: list[Any], found: Predictions) -> None:
    """Relative errors of hidden states but those after the final norm, which transformers gives last."""
    states = []
    for model in models:
        rows = zip(windows.tokens, windows.lengths, strict=True)
        with torch.no_grad():
            outs = [
                model(row[None, :n], output_hidden_states=True).hidden_states for row, n in rows
            ]
        states.append([torch.cat([out[layer][0] for out in outs]) for layer in (1, 2)])
    for layer, (one, other) in enumerate(zip(*states, strict=True)):
        expected = ((other - one).norm() / one.norm()).item()
        assert found.layer_errors[layer] == pytest.approx(expected, rel=1e-3)
    assert len(found.layer_errors) == 3


def test_a_store_is_no_distance_from_itself(tmp_path: Path) -> None:
    store = convert(STORIES, tmp_path / "nf4", format="nf4").path
    ids = AutoTokenizer.from_pretrained(STORIES)(TEXT.read_text()[:1500]).input_ids
    windows = cut_windows([ids], [], 128)
    assert windows is not None
    reference, found, checkpoint = measured(windows, store, store, STORIES)
    figures = divergence_figures(windows, reference, found)
    assert (figures.mean, figures.max, figures.top1) == (0, 0, 1)
    assert found.layer_errors == [0.0] * 12
    assert divergence_figures(windows, reference, checkpoint).mean > 1e-3


def test_greedy_continuations_are_transformers(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    prompts = torch.randint(4, 256, (3, 9))
    expected = torch.tensor([greedy(model, prompt.tolist(), 12) for prompt in prompts])
    guess = torch.randint(4, 256, (3, 12))
    with Sweep(open_model(tmp_path), CPU, torch.float32, context=21) as sweep:
        found, sweeps = continue_greedily(sweep, prompts, guess, silent)
        assert torch.equal(found, expected) and sweeps <= 12
        again, sweeps = continue_greedily(sweep, prompts, expected, silent)
        assert torch.equal(again, expected) and sweeps == 1  # it only had to be confirmed


def test_windows_of_too_little_text_are_none() -> None:
    assert cut_windows([[5]], [], 8) is None
    assert cut_windows([[]], [1], 8) is None
    windows = cut_windows([[5], [6, 7, 8]], [1], 3)
    assert windows is not None
    assert windows.tokens.tolist() == [[1, 5, 0], [1, 6, 7], [1, 8, 0]] and windows.count == 4
