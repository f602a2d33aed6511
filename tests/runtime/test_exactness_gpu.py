"""The same rings on CUDA in float32: greedy tokens equal transformers', streamed or resident."""

import pytest
import torch
from architectures import SUPPORTED
from rings import local_ring, manual_plan, run_all
from test_exactness import NEW_TOKENS, make_store, prompts, reference, requests  # noqa: F401

from headrace.runtime.store import Store
from headrace.scheduler.placement import Tier
from headrace.scheduler.request import SamplingParams

RINGS = [
    {"stages": 1, "tier": Tier.DEVICE, "token_budget": 4096},
    {"stages": 1, "tier": Tier.HOST, "token_budget": 16},
    {"stages": 2, "cyclic": True, "tier": Tier.NVME, "token_budget": 64},
]


@pytest.mark.gpu
@pytest.mark.parametrize("name", SUPPORTED)
def test_matches_transformers(name: str, make_store) -> None:  # noqa: F811
    path, model, vocab = make_store(name)
    store = Store.open(path)
    with torch.inference_mode():
        want = {i: reference(model, prompt) for i, prompt in enumerate(prompts(vocab))}
    greedy = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    for ring in RINGS:
        plan = manual_plan(store, num_pages=24, **ring)
        with local_ring(path, plan, device="cuda") as pipeline:
            assert run_all(plan, pipeline, requests(vocab, greedy)) == want, ring
