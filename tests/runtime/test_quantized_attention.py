"""Quantized pages on the CPU: what a query sees depends on its position alone, bit for bit."""

import random
from itertools import pairwise

import pytest
import torch
from attention_cases import CASES, micro_batch
from bits import same_bits
from quantized_cases import expected, make_quantized
from torch import Tensor

from headrace.runtime.attention.paged import paged_attention
from headrace.runtime.batch import Batch
from headrace.runtime.kv.store import KVStore, QuantizedKV
from headrace.runtime.manifest import LayerShape
from headrace.scheduler.kv_format import FORMATS
from headrace.scheduler.plan import PAGE_TOKENS

CPU = torch.device("cpu")
QUANTIZED = ["int8", "int4"]
LENGTH, KV_HEADS, DIM = 330, 2, 32


def layer(fmt: str) -> QuantizedKV:
    shape = LayerShape(KV_HEADS, DIM, DIM, 0, 0, 0)
    found = KVStore({0: shape}, 24, torch.float32, CPU, FORMATS[fmt], 3).layer(0)
    assert isinstance(found, QuantizedKV)
    for side in (found.k, found.v):  # what earlier owners left must not matter
        side.tails.fill_(torch.nan)
        side.scales.fill_(torch.nan)
    return found


def inputs(heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values of one sequence."""
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.randn(LENGTH, count, DIM, generator=generator) * 2
        for count in (heads, KV_HEADS, KV_HEADS)
    )


def attend_in(
    cuts: list[int], kv: QuantizedKV, q: Tensor, k: Tensor, v: Tensor, **rule: object
) -> Tensor:
    """Attention of one sequence whose slices end at `cuts`."""
    pages = list(range(17, 0, -3))
    out = []
    for a, b in pairwise([0, *cuts]):
        batch = Batch.build(micro_batch([(a, b - a)], pages), CPU)
        out.append(
            paged_attention(q[a:b], k[a:b], v[a:b], kv, batch, scaling=DIM**-0.5, **rule)  # type: ignore[arg-type]
        )
    return torch.cat(out)


def cuttings() -> list[list[int]]:
    rng = random.Random(3)
    some = [sorted({*rng.sample(range(1, LENGTH), n), LENGTH}) for n in (3, 20)]
    return [[64, 128, LENGTH], [63, 65, 200, LENGTH], [100, *range(120, LENGTH + 1)], *some]


RULES = [
    {},
    {"sliding_window": 70},
    {"sliding_window": 5, "sinks": True},
    {"softcap": 3.0},
]


@pytest.mark.parametrize(("heads", "threads"), [(2, 1), (6, 2)])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_any_chunks_give_the_same_bits(
    fmt: str, rule: dict[str, object], heads: int, threads: int
) -> None:
    q, k, v = inputs(heads)
    if "sinks" in rule:
        rule = rule | {"sinks": torch.linspace(-1, 1, heads)}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kv = layer(fmt)
        want = attend_in([LENGTH], kv, q, k, v, **rule)
        assert want.isfinite().all()
        for cuts in cuttings():
            other = layer(fmt)
            found = attend_in(cuts, other, q, k, v, **rule)
            assert same_bits(found, want), cuts
            for ours, theirs in ((kv.k, other.k), (kv.v, other.v)):
                assert torch.equal(ours.codes, theirs.codes)
                full = list(range(17, 2, -3))[: LENGTH // 64]
                assert torch.equal(ours.scales[full], theirs.scales[full])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].k_dim % 16 == 0])
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_batches_equal_the_reference(fmt: str, name: str) -> None:
    real = make_quantized(CASES[name], FORMATS[fmt], torch.float32, CPU)
    rule = real.rule
    out = paged_attention(
        real.q, real.k, real.v, real.kv, real.batch,
        scaling=rule.scaling, sliding_window=rule.sliding_window, softcap=rule.softcap,
        sinks=rule.sinks,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), expected(real), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fmt", QUANTIZED)
@pytest.mark.parametrize("wide", [False, True])
def test_bfloat16_is_close(wide: bool, fmt: str) -> None:
    """Also where a model hands on queries and keys that are wider than the compute type."""
    real = make_quantized(CASES["everything"], FORMATS[fmt], torch.bfloat16, CPU)
    rule = real.rule
    q, k = (x.float() if wide else x for x in (real.q, real.k))
    out = paged_attention(
        q, k, real.v, real.kv, real.batch,
        scaling=rule.scaling, sliding_window=rule.sliding_window, softcap=rule.softcap,
        sinks=rule.sinks,
    )  # fmt: skip
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.double(), expected(real), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_a_full_page_is_never_written_again(fmt: str) -> None:
    """A page of the sequence is as it was when it was filled, whatever came after."""
    q, k, v = inputs(2)
    kv = layer(fmt)
    attend_in([70], kv, q, k, v)
    before = kv.k.codes[17].clone(), kv.k.scales[17].clone()
    longer = layer(fmt)
    attend_in([70, *range(71, LENGTH + 1)], longer, q, k, v)
    assert torch.equal(longer.k.codes[17], before[0])
    assert torch.equal(longer.k.scales[17], before[1])
    # Pages that are not full were not touched.
    assert longer.k.scales[17 - 3 * (LENGTH // PAGE_TOKENS)].isnan().all()
