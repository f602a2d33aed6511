"""Random ragged batches over quantized pages, and what attention over them should be, in float64."""

import math
from dataclasses import dataclass

import torch
from attention_cases import Case, micro_batch
from torch import Tensor

from headrace.runtime.attention.softmax import Rule
from headrace.runtime.batch import Batch
from headrace.runtime.kv.codes import dequantize, quantize
from headrace.runtime.kv.store import Coded, KVStore, QuantizedKV, whole_keys
from headrace.scheduler.kv_format import KVFormat
from headrace.scheduler.plan import PAGE_TOKENS, Slice


@dataclass(frozen=True)
class Made:
    """A case made real: the past in pages and tails, and whole sequences' rotated keys and values."""

    batch: Batch
    kv: QuantizedKV
    q: Tensor
    k: Tensor
    v: Tensor
    rule: Rule
    slices: tuple[Slice, ...]
    whole: tuple[tuple[Tensor, Tensor], ...]


def quantized_layer(
    case: Case, fmt: KVFormat, pages: int, dtype: torch.dtype, device: torch.device
) -> QuantizedKV:
    """Blank pages and a tail for each sequence, full of what must not matter."""
    kv = KVStore({0: case.shape}, pages, dtype, device, fmt, len(case.spans) + 1).layer(0)
    assert isinstance(kv, QuantizedKV)
    for side in (kv.k, kv.v):
        side.tails.fill_(torch.nan)
        side.scales.fill_(torch.nan)
    return kv


def make_quantized(case: Case, fmt: KVFormat, dtype: torch.dtype, device: torch.device) -> Made:
    random = torch.Generator().manual_seed(0)
    needed = sum(-(-(past + new) // PAGE_TOKENS) for past, new in case.spans)
    kv = quantized_layer(case, fmt, needed + 3, dtype, device)
    work = micro_batch(case.spans, torch.randperm(needed + 3, generator=random).tolist())

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=random).to(dtype).to(device)

    sinks = randn(case.heads) if case.sinks else None
    new, whole = [], []
    for piece in work.slices:
        k, v = (randn(piece.end, case.kv_heads, dim) for dim in (case.k_dim, case.v_dim))
        _, *rotated = kv.rotate(k.new_zeros(1, 1, case.q_dim), k, v)
        for side, x in zip((kv.k, kv.v), rotated, strict=True):
            keep_past(side, x[: piece.start], piece)
        new.append((randn(len(piece.tokens), case.heads, case.q_dim) * 2, k[piece.start :], v[piece.start :]))  # fmt: skip
        whole.append((rotated[0], rotated[1]))
    q, k, v = (torch.cat(tensors) for tensors in zip(*new, strict=True))
    rule = Rule(case.q_dim**-0.5, case.window, case.softcap, sinks)
    return Made(Batch.build(work, device), kv, q, k, v, rule, work.slices, tuple(whole))


def keep_past(side: Coded, x: Tensor, piece: Slice) -> None:
    """x [n, heads, dim] from the sequence's start on, in pages and in its tail."""
    full = len(x) // PAGE_TOKENS
    for page, some in zip(piece.pages, x.split(PAGE_TOKENS)[:full], strict=False):
        codes, scales = quantize(some.transpose(0, 1), side.fmt)
        side.codes[page], side.scales[page] = codes, scales.mT
    left = x[full * PAGE_TOKENS :].transpose(0, 1)
    side.tails[piece.tail, :, : left.shape[1]] = left


def expected(made: Made) -> Tensor:
    """[T, heads, v_dim]: own pages as computed, those before as they lie in the store."""
    q, *_ = made.kv.rotate(made.q, made.k, made.v)
    out, start = [], 0
    for piece, (k, v) in zip(made.slices, made.whole, strict=True):
        rows = q[start : start + len(piece.tokens)].cpu().double()
        start += len(piece.tokens)
        past = stored(made.kv.k, piece), stored(made.kv.v, piece)
        both = ((whole_keys(made.kv, *pair), pair[1]) for pair in ((k, v), past))
        out.append(_one(rows, *both, made.rule))
    found, values = torch.cat(out), made.kv.v.rotation
    return found if values is None else found @ values.back.cpu().double()


def stored(side: Coded, piece: Slice) -> Tensor:
    """What the full pages of a sequence hold [n, heads, dim]."""
    pages = list(piece.pages[: piece.end // PAGE_TOKENS])
    found = dequantize(side.codes[pages], side.scales[pages].mT, side.fmt)
    return found.transpose(1, 2).flatten(0, 1)


def _one(q: Tensor, exact: tuple[Tensor, ...], coded: tuple[Tensor, ...], rule: Rule) -> Tensor:
    length, full = len(exact[0]), len(coded[0])
    qi = torch.arange(length - len(q), length)[:, None]
    ki = torch.arange(length)[None, :]
    before = ki // PAGE_TOKENS < qi // PAGE_TOKENS
    group = q.shape[1] // exact[0].shape[1]
    own_k, own_v, past_k, past_v = (
        x.cpu().double().repeat_interleave(group, 1).transpose(0, 1) for x in (*exact, *coded)
    )
    past_k, past_v = (
        torch.cat([x, y[:, full:]], dim=1) for x, y in ((past_k, own_k), (past_v, own_v))
    )
    queries = q.transpose(0, 1)
    scores = torch.where(before, queries @ past_k.mT, queries @ own_k.mT) * rule.scaling
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    hidden = ki > qi
    if rule.sliding_window is not None:
        hidden = hidden | (ki <= qi - rule.sliding_window)
    scores = scores.masked_fill(hidden, -math.inf)
    if rule.sinks is not None:
        column = rule.sinks.cpu().double()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., :length]
    return ((weights * before) @ past_v + (weights * ~before) @ own_v).transpose(0, 1)
