"""Quantized pages on the CPU: what a query sees depends on its position alone, bit for bit."""

import random
from itertools import pairwise

import pytest
import torch
from attention_cases import micro_batch
from torch import Tensor

from headrace.runtime.attention import paged_attention
from headrace.runtime.batch import Batch
from headrace.runtime.kv_store import KVStore, QuantizedKV
from headrace.runtime.store import LayerShape
from headrace.scheduler.kv_format import FORMATS

CPU = torch.device("cpu")
QUANTIZED = ["int8", "int4"]
LENGTH, HEADS, KV_HEADS, DIM = 330, 4, 2, 32


def layer(fmt: str, kv_heads: int = KV_HEADS, dim: int = DIM) -> QuantizedKV:
    shape = LayerShape(kv_heads, dim, dim, 0, 0, 0)
    found = KVStore({0: shape}, 24, torch.float32, CPU, FORMATS[fmt], 3).layer(0)
    assert isinstance(found, QuantizedKV)
    for side in (found.k, found.v):  # what earlier owners left must not matter
        side.tails.fill_(torch.nan)
        side.scales.fill_(torch.nan)
    return found


def inputs(heads: int = HEADS, kv_heads: int = KV_HEADS, dim: int = DIM) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.randn(LENGTH, count, dim, generator=generator) * 2
        for count in (heads, kv_heads, kv_heads)
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
    some = [sorted({*rng.sample(range(1, LENGTH), n), LENGTH}) for n in (3, 20, 90)]
    return [[64, 128, LENGTH], list(range(1, LENGTH + 1)), [63, 65, 200, LENGTH], *some]


RULES = [
    {},
    {"sliding_window": 70},
    {"sliding_window": 5, "sinks": True},
    {"softcap": 3.0},
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("heads", [2, 4, 6])
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
            assert torch.equal(attend_in(cuts, other, q, k, v, **rule), want), cuts
            for ours, theirs in ((kv.k, other.k), (kv.v, other.v)):
                assert torch.equal(ours.codes, theirs.codes)
                full = list(range(17, 2, -3))[: LENGTH // 64]
                assert torch.equal(ours.scales[full], theirs.scales[full])
    finally:
        torch.set_num_threads(before)
