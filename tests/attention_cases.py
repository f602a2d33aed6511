"""Random ragged batches and what attention over them should be, in float64 and without pages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.runtime.attention.softmax import Rule
from headrace.runtime.batch import Batch
from headrace.runtime.kv.store import KVStore, LayerKV
from headrace.runtime.manifest import LayerShape
from headrace.scheduler.plan import PAGE_TOKENS, MicroBatch, Slice


@dataclass(frozen=True)
class Case:
    """`spans` are (tokens already in pages, tokens of the slice), one pair a sequence."""

    spans: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    latent: bool = False

    @property
    def q_dim(self) -> int:
        return self.k_dim + self.v_dim * self.latent

    @property
    def shape(self) -> LayerShape:
        return LayerShape(self.kv_heads, self.k_dim, self.v_dim, 0, 0, 0, self.latent)

    def whole_keys(self, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([v, k], dim=-1) if self.latent else k


@dataclass(frozen=True)
class Tensors:
    """A case made real: keys and values of whole sequences, and pages that hold the past ones."""

    batch: Batch
    kv: LayerKV
    q: Tensor
    k: Tensor
    v: Tensor
    rule: Rule
    expected: Tensor


def micro_batch(spans: Sequence[tuple[int, int]], pages: Sequence[int]) -> MicroBatch:
    """Slices with distinct pages, taken from `pages` in order, and tails."""
    slices, used = [], 0
    for request, (past, new) in enumerate(spans):
        count = -(-(past + new) // PAGE_TOKENS)
        mine = tuple(pages[used : used + count])
        slices.append(Slice(request, past, (0,) * new, mine, None, tail=request))
        used += count
    return MicroBatch(tuple(slices))


def make(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    ends = [past + new for past, new in case.spans]
    needed = sum(-(-end // PAGE_TOKENS) for end in ends)
    order = torch.randperm(needed + 3, generator=random).tolist()
    kv = KVStore({0: case.shape}, needed + 3, dtype, device).layer(0)
    assert isinstance(kv, LayerKV)
    kv.k.fill_(torch.nan)  # what earlier owners of the pages left must not matter
    kv.v.fill_(torch.nan)
    work = micro_batch(case.spans, order)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=random).to(dtype)

    sinks = randn(case.heads) if case.sinks else None
    rule = Rule(case.q_dim**-0.5, case.window, case.softcap, sinks)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for piece in work.slices:
        k = randn(piece.end, case.kv_heads, case.k_dim)
        v = randn(piece.end, case.kv_heads, case.v_dim)
        q = randn(len(piece.tokens), case.heads, case.q_dim) * 2
        for position in range(piece.start):
            page, offset = piece.pages[position // PAGE_TOKENS], position % PAGE_TOKENS
            kv.k[page, :, offset] = k[position].to(device)
            kv.v[page, :, offset] = v[position].to(device)
        expected = reference(q, case.whole_keys(k, v), v, rule)
        parts.append((q, k[piece.start :], v[piece.start :], expected))
    q, k, v, expected = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    rule = Rule(rule.scaling, rule.sliding_window, rule.softcap, _moved(sinks, device))
    batch = Batch.build(work, device)
    return Tensors(batch, kv, q.to(device), k.to(device), v.to(device), rule, expected)


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def reference(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """The last n queries of one sequence: q [n, H, Dk], k [L, h, Dk], v [L, h, Dv] to [n, H, Dv]."""
    group = q.shape[1] // k.shape[1]
    queries = q.double().transpose(0, 1)
    keys = k.double().repeat_interleave(group, dim=1).transpose(0, 1)
    values = v.double().repeat_interleave(group, dim=1).transpose(0, 1)
    scores = queries @ keys.mT * rule.scaling  # [H, n, L]
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    length = k.shape[0]
    qi = torch.arange(length - q.shape[0], length)[:, None]
    ki = torch.arange(length)[None, :]
    hidden = ki > qi
    if rule.sliding_window is not None:
        hidden |= ki <= qi - rule.sliding_window
    scores = scores.masked_fill(hidden, -math.inf)
    if rule.sinks is not None:
        column = rule.sinks.double()[:, None, None].expand(-1, q.shape[0], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., :length]
    return (weights @ values).transpose(0, 1)


SMALL = ((0, 3), (62, 4), (64, 1), (130, 1), (0, 1), (40, 19))
LONG = ((200, 1), (0, 70), (127, 3))
MIXED = ((0, 5), (99, 1), (70, 90), (127, 1), (128, 1), (0, 1), (3, 2))
CASES = {
    "mixed": Case(MIXED, heads=4, kv_heads=2, k_dim=16, v_dim=16),
    "heads of their own": Case(MIXED, heads=3, kv_heads=3, k_dim=32, v_dim=32),
    "eight share, window": Case(MIXED, heads=8, kv_heads=1, k_dim=64, v_dim=64, window=70),
    "narrow window": Case(MIXED, heads=4, kv_heads=2, k_dim=16, v_dim=16, window=3),
    "softcap": Case(MIXED, heads=4, kv_heads=2, k_dim=24, v_dim=24, softcap=2.0),
    "sinks": Case(MIXED, heads=6, kv_heads=2, k_dim=80, v_dim=80, sinks=True),
    "values narrower": Case(MIXED, heads=4, kv_heads=4, k_dim=24, v_dim=16),
    "latents": Case(MIXED, heads=6, kv_heads=1, k_dim=16, v_dim=32, latent=True),
    "everything": Case(
        MIXED, heads=10, kv_heads=2, k_dim=96, v_dim=128, window=40, softcap=5.0, sinks=True
    ),
}
