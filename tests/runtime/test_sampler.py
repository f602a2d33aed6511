"""Draws follow their distribution and depend on nothing but their own row."""

import math
import random

import pytest
import torch
from torch import Tensor

from headrace.runtime.sampler import sample, uniform
from headrace.scheduler.errors import StageError
from headrace.scheduler.plan import Sampling

PLAIN = Sampling(
    temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
    frequency_penalty=0.0, seed=0, logprobs=None, num_prompt=0, history=(),
)  # fmt: skip
GREEDY = PLAIN._replace(temperature=0.0)


def draws(row: Tensor, how: Sampling, count: int) -> Tensor:
    """How often each token comes, over `count` positions."""
    logits = row.expand(count, -1).contiguous()
    samples = sample(logits, [(0, position, how) for position in range(count)])
    return torch.bincount(torch.tensor([s.token for s in samples]), minlength=len(row))


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    live = expected > 0
    assert counts[~live].sum() == 0
    return float(((counts - expected)[live] ** 2 / expected[live]).sum())


def reference(row: Tensor, how: Sampling) -> Tensor:
    """Probabilities by sorting and cutting in plain Python."""
    scaled = [x / how.temperature for x in row.double().tolist()]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if how.top_k > 0:
        order = order[: how.top_k]
    weights = {i: math.exp(scaled[i] - scaled[order[0]]) for i in order}
    total, kept, mass = sum(weights.values()), [], 0.0
    for i in order:
        if mass >= how.top_p * total:
            break
        kept.append(i)
        mass += weights[i]
    kept = [i for i in kept if weights[i] >= how.min_p]
    out = torch.zeros(len(row), dtype=torch.float64)
    for i in kept:
        out[i] = weights[i]
    return out / out.sum()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 500},
        {"top_p": 0.7},
        {"top_p": 1e-9},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 6, "top_p": 0.8},
        {"top_k": 8, "top_p": 0.9, "min_p": 0.15, "temperature": 1.3},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(change: dict[str, float]) -> None:
    row = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    how = PLAIN._replace(seed=11, **change)  # type: ignore[arg-type]
    counts = draws(row, how, 4000)
    # 11 degrees of freedom: 31.3 is exceeded once in a thousand, and the seed is fixed.
    assert chi_square(counts, reference(row, how)) < 31.3


def test_seeds_and_positions_give_even_numbers() -> None:
    by_position = torch.tensor([uniform(5, p) for p in range(20000)], dtype=torch.float64)
    by_seed = torch.tensor([uniform(s, 5) for s in range(20000)], dtype=torch.float64)
    for numbers in (by_position, by_seed):
        assert numbers.min() >= 0 and numbers.max() < 1
        counts = torch.histc(numbers, 50, 0, 1)
        assert chi_square(counts, torch.full((50,), 1 / 50)) < 85.4  # 49 degrees, 1 in 1000
        assert abs(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]) < 0.03
    assert uniform(1, 2) != uniform(2, 1)
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def random_sampling(rng: random.Random) -> Sampling:
    history = tuple(rng.randrange(300) for _ in range(rng.randrange(1, 30)))
    penalized = rng.random() < 0.4
    return Sampling(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
        top_k=rng.choice([0, 1, 3, 50, 1000]),
        top_p=rng.choice([1.0, 0.9, 0.3]),
        min_p=rng.choice([0.0, 0.1]),
        repetition_penalty=rng.choice([1.3, 0.8]) if penalized else 1.0,
        presence_penalty=rng.choice([0.0, 1.0]) if penalized else 0.0,
        frequency_penalty=rng.choice([0.0, -0.5]) if penalized else 0.0,
        seed=rng.getrandbits(63),
        logprobs=rng.choice([None, 0, 3]),
        num_prompt=rng.randrange(len(history) + 1),
        history=history if penalized else (),
    )


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = random.Random(1)
    logits = torch.randn(60, 300, generator=torch.Generator().manual_seed(1)) * 2
    rows = [(i, rng.randrange(5000), random_sampling(rng)) for i in range(60)]
    together = sample(logits, rows)
    order = list(range(60))
    rng.shuffle(order)
    shuffled = sample(logits[order], [rows[i] for i in order])
    alone = [sample(logits[i : i + 1], [rows[i]])[0] for i in range(60)]
    assert [shuffled[order.index(i)].token for i in range(60)] == [s.token for s in together]
    for one, many in zip(alone, together, strict=True):
        assert (one.request, one.token) == (many.request, many.token)
        assert one.logprob == pytest.approx(many.logprob, abs=1e-5)
        assert [t for t, _ in one.top] == [t for t, _ in many.top]


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 5.0]])
    samples = sample(logits, [(7, 0, GREEDY), (8, 9, GREEDY._replace(temperature=1e-6))])
    assert [(s.request, s.token, s.logprob, s.top) for s in samples] == [
        (7, 1, None, ()),
        (8, 0, None, ()),
    ]


def test_top_k_keeps_equals_at_its_edge() -> None:
    counts = draws(torch.tensor([1.0, 3.0, 1.0, 0.0]), PLAIN._replace(top_k=2), 500)
    assert (counts[:3] > 0).all() and counts[3] == 0


def test_penalties_follow_their_definitions() -> None:
    row = torch.tensor([4.0, -1.0, 3.9, 0.5, 3.8])
    how = GREEDY._replace(repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.4,
        num_prompt=2, history=(0, 1, 2, 2, 3),
    )  # fmt: skip
    expected = [4.0 / 1.5, -1.0 * 1.5, 3.9 / 1.5 - 0.3 - 0.8, 0.5 / 1.5 - 0.3 - 0.4, 3.8]
    # Seen through the distribution: at temperature 1, log-frequencies differ as the logits do.
    counts = draws(row, how._replace(temperature=1.0), 6000)
    assert chi_square(counts, torch.tensor(expected).double().softmax(0)) < 18.5  # 4 degrees
    assert sample(row[None], [(0, 0, how)])[0].token == 4
    assert sample(row[None], [(0, 0, GREEDY)])[0].token == 0


def test_penalties_leave_the_logits_alone_and_ignore_ids_without_one() -> None:
    logits = torch.tensor([[1.0, 0.5]])
    how = GREEDY._replace(presence_penalty=2.0, history=(0, 9))
    assert sample(logits, [(0, 0, how)])[0].token == 1
    assert logits.tolist() == [[1.0, 0.5]]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(-1)
    hot = PLAIN._replace(temperature=3.0, logprobs=0, presence_penalty=2.0, history=(1, 2))
    samples = sample(logits, [(0, 0, GREEDY._replace(logprobs=4)), (1, 0, hot), (2, 0, GREEDY)])
    first, second, third = samples
    best = expected[0].topk(4)
    assert [t for t, _ in first.top] == best.indices.tolist()
    assert [p for _, p in first.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert first.logprob == pytest.approx(float(expected[0].max()), abs=1e-5)
    assert second.top == ()
    assert second.logprob == pytest.approx(float(expected[1, second.token]), abs=1e-5)
    assert third.logprob is None


def test_more_logprobs_than_tokens() -> None:
    (only,) = sample(torch.tensor([[0.0, 1.0]]), [(0, 0, GREEDY._replace(logprobs=20))])
    assert [t for t, _ in only.top] == [1, 0]


def test_impossible_tokens_are_never_drawn() -> None:
    row = torch.full((50,), -math.inf)
    row[[3, 17]] = 0.0
    counts = draws(row, PLAIN._replace(top_p=0.999, top_k=40), 300)
    assert counts[3] + counts[17] == 300 and counts[3] > 0 < counts[17]


@pytest.mark.parametrize("how", [GREEDY, PLAIN, PLAIN._replace(top_p=0.5, logprobs=2)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_logits_name_their_request(bad: float, how: Sampling) -> None:
    logits = torch.zeros(3, 8)
    logits[1, 5] = bad
    with pytest.raises(StageError, match="request 42: the logits for position 6 are not finite"):
        sample(logits, [(41, 6, how), (42, 6, how), (43, 6, how)])


def test_rows_of_nothing_but_impossible_tokens_are_damaged() -> None:
    with pytest.raises(StageError, match="request 1"):
        sample(torch.full((1, 8), -math.inf), [(1, 0, PLAIN)])


def test_no_rows() -> None:
    assert sample(torch.zeros(0, 8), []) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_draws_what_the_cpu_draws() -> None:
    rng = random.Random(4)
    logits = torch.randn(64, 50000, generator=torch.Generator().manual_seed(2)) * 3
    rows = [(i, rng.randrange(5000), random_sampling(rng)) for i in range(64)]
    tokens = [[s.token for s in sample(x, rows)] for x in (logits, logits.cuda())]
    assert tokens[0] == tokens[1]
