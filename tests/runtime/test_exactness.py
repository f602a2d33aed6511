"""Placement never changes the answer: every architecture, every ring, against transformers."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SUPPORTED, greedy, tiny_model
from rings import local_ring, manual_plan, run_all

from headrace.runtime.conversion.convert import convert
from headrace.runtime.store import Store
from headrace.scheduler.placement import Tier
from headrace.scheduler.request import Request, SamplingParams

LENGTHS = (1, 3, 9, 14, 20, 33, 65, 70)
"""Ragged: below, at and beyond a page of 64 tokens, and beyond the sliding windows of 8."""

NEW_TOKENS = 24
FEW_TOKENS = 8
"""With the first, a prompt of one token is beyond a window, too."""

EVERY_RING = [
    {"stages": stages, "cyclic": cyclic, "tier": tier, "token_budget": budget}
    for stages, cyclic, tier, budget in itertools.product(
        (1, 2, 3), (False, True), (Tier.DEVICE, Tier.NVME), (16, 4096)
    )
    if stages > 1 or not cyclic
]
# Half of them with a pass ahead: each tier and each budget on contiguous and on cyclic rings.
RINGS = [ring | {"ahead": (i + i // 2 + i // 8) % 2} for i, ring in enumerate(EVERY_RING)]
FEW_RINGS = [
    {"stages": 1, "cyclic": False, "tier": Tier.DEVICE, "token_budget": 4096},
    {"stages": 3, "cyclic": True, "tier": Tier.NVME, "token_budget": 96, "ahead": 1},
]
GPU_RINGS = [
    {"stages": 1, "tier": Tier.DEVICE, "token_budget": 4096, "ahead": 1},
    {"stages": 1, "tier": Tier.HOST, "token_budget": 16},
    {"stages": 2, "cyclic": True, "tier": Tier.NVME, "token_budget": 64, "ahead": 1},
]

Outputs = dict[int, list[int]]


class Made:
    """One architecture's random model, its store, and 8 prompts with what transformers answers."""

    def __init__(self, name: str, folder: Path, new_tokens: int) -> None:
        model = tiny_model(name)
        model.save_pretrained(folder / "checkpoint")
        self.path = folder / "store"
        convert(folder / "checkpoint", self.path, format="keep", allow_missing_tokenizer=True)
        self.new_tokens = new_tokens
        generator = torch.Generator().manual_seed(7)
        vocab = model.config.vocab_size
        self.prompts = [
            torch.randint(3, vocab, (n,), generator=generator).tolist() for n in LENGTHS
        ]
        self.greedy = {i: greedy(model, p, new_tokens) for i, p in enumerate(self.prompts)}

    def serve(self, ring: dict[str, Any], device: str = "cpu") -> tuple[Outputs, Outputs]:
        """What a ring answers, greedily and sampled; both kinds of requests ride the same passes."""
        params = [
            SamplingParams(temperature=temperature, max_tokens=self.new_tokens)
            for temperature in (0.0, 0.8)
        ]
        requests = [
            Request(i, list(prompt), params[i // len(LENGTHS)], seed=100 + i)
            for i, prompt in enumerate(self.prompts * 2)
        ]
        plan = manual_plan(Store.open(self.path), num_pages=24, **ring)
        with local_ring(self.path, plan, device) as pipeline:
            outputs = run_all(plan, pipeline, requests)
        assert len(outputs) == len(requests)
        sampled = {i: outputs.pop(i) for i in range(len(LENGTHS), len(requests))}
        return outputs, sampled


Make = Callable[..., Made]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda name, new_tokens=NEW_TOKENS: Made(name, tmp_path, new_tokens)


def check(made: Made, rings: list[dict[str, Any]]) -> None:
    first: Outputs | None = None
    for ring in rings:
        outputs, sampled = made.serve(ring)
        assert outputs == made.greedy, ring
        first = first or sampled
        assert sampled == first, ring
        assert all(sampled[i + len(LENGTHS)] != outputs[i] for i in range(len(LENGTHS)))


@pytest.mark.parametrize("name", SUPPORTED)
def test_matches_transformers(name: str, make: Make) -> None:
    check(make(name, FEW_TOKENS), FEW_RINGS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SUPPORTED)
def test_every_ring_matches_transformers(name: str, make: Make) -> None:
    check(make(name), RINGS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SUPPORTED)
def test_matches_transformers_on_cuda(name: str, make: Make) -> None:
    """In float32. Sampled tokens may differ between rings there: sums depend on the batch."""
    made = make(name)
    for ring in GPU_RINGS:
        assert made.serve(ring, "cuda")[0] == made.greedy, ring
