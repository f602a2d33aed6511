"""Masks and biases on logits."""

import math

import pytest
import torch
from torch import Tensor

from headrace.runtime.constraints import constrained
from headrace.runtime.sampler import sample
from headrace.scheduler.plan import Sampling

GREEDY = Sampling(0.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0, None, 0, ())
DRAWN = GREEDY._replace(temperature=1.0)
WORDS = 21  # no multiple of 8


def mask_of(*tokens: int, size: int = 3) -> bytes:
    bits = bytearray(size)
    for token in tokens:
        bits[token // 8] |= 1 << token % 8
    return bytes(bits)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(5, WORDS, generator=torch.Generator().manual_seed(1))


def test_rows_without_constraints_are_left_alone(logits: Tensor) -> None:
    assert constrained(logits, [GREEDY] * 5) is logits


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_mask_leaves_its_tokens_and_no_others(logits: Tensor, size: int) -> None:
    before, allowed = logits.clone(), [0, 7, *([16, 20] if size > 1 else [])]
    how = GREEDY._replace(mask=mask_of(*allowed, size=size))
    found = constrained(logits, [GREEDY, how, GREEDY, how, GREEDY])
    assert torch.equal(logits, before)
    for i in range(5):
        kept = allowed if i in (1, 3) else range(WORDS)
        assert [j for j in range(WORDS) if found[i, j] > -math.inf] == [*kept]
        assert torch.equal(found[i, [*kept]], logits[i, [*kept]])


@pytest.mark.parametrize(
    "change", [{"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {}], ids=str
)
def test_only_allowed_tokens_are_drawn(logits: Tensor, change: dict[str, float]) -> None:
    allowed = logits[0].argsort()[:4].tolist()  # the least likely ones
    how = DRAWN._replace(mask=mask_of(*allowed), repetition_penalty=1.5, history=(2, 3, *allowed))
    how = how._replace(**change)  # type: ignore[arg-type]
    rows = [(0, position, how) for position in range(200)]
    drawn = {one.token for one in sample(logits[:1].expand(200, -1).contiguous(), rows)}
    assert drawn <= {*allowed}
    assert len(drawn) > 1 or how.temperature == 0.0


def test_a_bias_forces_and_forbids_and_logprobs_are_of_the_model(logits: Tensor) -> None:
    plain = [one.token for one in sample(logits, [(0, 0, GREEDY)] * 5)]
    rows = [
        (0, 0, GREEDY._replace(logprobs=2, logit_bias=((4, 100.0), (WORDS, 100.0)))),
        (0, 0, GREEDY._replace(logit_bias=((plain[1], -100.0),))),
        (0, 0, DRAWN._replace(logit_bias=((6, 100.0), (7, -100.0)))),
        (0, 0, GREEDY),
        (0, 0, GREEDY._replace(logit_bias=((9, 100.0),), mask=mask_of(3))),
    ]
    forced, forbidden, drawn, free, bound = sample(logits, rows)
    assert (forced.token, drawn.token, free.token, bound.token) == (4, 6, plain[3], 3)
    assert forbidden.token == logits[1].topk(2).indices[1]
    raw = logits[0].log_softmax(-1)
    assert forced.logprob == pytest.approx(float(raw[4]), abs=1e-5)
    assert [token for token, _ in forced.top] == raw.topk(2).indices.tolist()
