"""Placement never changes the answer: every architecture, every ring, against transformers."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SUPPORTED, tiny_config
from rings import local_ring, manual_plan, run_all
from transformers import AutoModelForCausalLM

from headrace.runtime.convert import convert
from headrace.runtime.store import Store
from headrace.scheduler.placement import Tier
from headrace.scheduler.request import Request, SamplingParams

NEW_TOKENS = 24
LENGTHS = (1, 3, 9, 14, 20, 33, 65, 70)
"""Ragged: below, at and beyond a page of 64 tokens, and beyond the sliding windows of 8."""

RINGS = [
    {"stages": stages, "cyclic": cyclic, "tier": tier, "token_budget": budget}
    for stages, cyclic, tier, budget in itertools.product(
        (1, 2, 3), (False, True), (Tier.DEVICE, Tier.NVME), (16, 4096)
    )
    if stages > 1 or not cyclic
]


def prompts(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in LENGTHS]


def reference(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """transformers' greedy continuation of one prompt alone."""
    output = model.generate(  # type: ignore[operator]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def requests(vocab: int, params: SamplingParams) -> list[Request]:
    return [Request(i, prompt, params, seed=100 + i) for i, prompt in enumerate(prompts(vocab))]


@pytest.fixture(scope="module")
def make_store(tmp_path_factory: pytest.TempPathFactory):
    def make(name: str) -> tuple[Path, torch.nn.Module, int]:
        folder = tmp_path_factory.mktemp(name)
        config = tiny_config(name)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # far from uniform, so that greedy is well defined
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.15)
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder / "checkpoint")
        convert(
            folder / "checkpoint", folder / "store", format="keep", allow_missing_tokenizer=True
        )
        return folder / "store", model, config.vocab_size

    return make


FEW_RINGS = [
    {"stages": 1, "cyclic": False, "tier": Tier.DEVICE, "token_budget": 4096},
    {"stages": 3, "cyclic": True, "tier": Tier.NVME, "token_budget": 16},
]


@pytest.mark.parametrize("name", SUPPORTED)
def test_matches_transformers(name: str, make_store) -> None:
    check(make_store(name), FEW_RINGS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SUPPORTED)
def test_every_ring_matches_transformers(name: str, make_store) -> None:
    check(make_store(name), RINGS)


def check(made: tuple[Path, torch.nn.Module, int], rings: list[dict[str, Any]]) -> None:
    path, model, vocab = made
    store = Store.open(path)
    with torch.inference_mode():
        want = {i: reference(model, prompt) for i, prompt in enumerate(prompts(vocab))}
    greedy = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    drawn = SamplingParams(temperature=0.8, max_tokens=NEW_TOKENS)
    first: dict[int, list[int]] | None = None
    for ring in rings:
        plan = manual_plan(store, num_pages=24, **ring)
        with local_ring(path, plan) as pipeline:
            assert run_all(plan, pipeline, requests(vocab, greedy)) == want, ring
            sampled = run_all(plan, pipeline, requests(vocab, drawn))
        first = first or sampled
        assert sampled == first, ring
