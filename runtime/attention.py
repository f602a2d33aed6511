"""Paged attention over ragged micro-batches: torch on CPUs, Triton on CUDA.

A query at position p sees the keys at positions (p - window, p] of its own sequence: transformers'
causal and sliding-window masks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.runtime.batch import (
    SCORES,
    Batch,
    Decodes,
    first_page,
    group_mask,
    head_rows,
    visible_keys,
)
from headrace.runtime.kv_store import LayerKV
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer
from headrace.scheduler.plan import PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class Rule:
    """How scores become weights: softmax over tanh(s * scaling / softcap) * softcap, and sinks.

    `sinks` [query_heads] are extra logits that take weight and give no value (gpt-oss).
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: LayerKV,
    batch: Batch,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tracer: Tracer = NULL_TRACER,
) -> Tensor:
    """Write k and v into their pages, then attend over the pages.

    q [T, query_heads, k_dim], k [T, kv_heads, k_dim], v [T, kv_heads, v_dim], any strides; returns
    [T, query_heads, v_dim] in q's dtype. Query head h reads key head h // (query_heads / kv_heads).
    A sequence's result does not depend on the other sequences of the batch.
    """
    rule = Rule(scaling, sliding_window, softcap, sinks)
    with tracer.span(Kind.ATTENTION):
        if q.is_cuda:
            # Imported where it is needed: installations without a GPU have no Triton.
            from headrace.runtime import attention_triton

            attention_triton.write(k, v, kv, batch)
            return attention_triton.attend(q, kv, batch, rule)
        _write(k, v, kv, batch)
        return _attend(q, kv, batch, rule)


def _write(k: Tensor, v: Tensor, kv: LayerKV, batch: Batch) -> None:
    page, offset = batch.page_offsets
    kv.k[page, :, offset] = k.to(kv.k.dtype)
    kv.v[page, :, offset] = v.to(kv.v.dtype)


def _attend(q: Tensor, kv: LayerKV, batch: Batch, rule: Rule) -> Tensor:
    groups = batch.decodes(rule.sliding_window, q.shape[1] * kv.k.shape[-1])
    if len(groups) == 1 and len(groups[0].rows) == len(q):  # the batch as it is
        return _attend_decodes(q, kv, groups[0], rule)
    out = q.new_empty(*q.shape[:2], kv.v.shape[-1])
    start = 0
    for sequence, length in enumerate(batch.lengths):
        if length > 1:
            rows = slice(start, start + length)
            out[rows] = _attend_slice(q[rows], kv, batch, sequence, rule)
        start += length
    for group in groups:
        out[group.rows] = _attend_decodes(q[group.rows], kv, group, rule)
    return out


def _attend_decodes(q: Tensor, kv: LayerKV, group: Decodes, rule: Rule) -> Tensor:
    """[G, heads, k_dim] to [G, heads, v_dim]."""
    count, heads, _ = q.shape
    kv_heads = kv.k.shape[1]
    rows = group.head_rows(kv_heads)
    k, v = _gather(kv.k, rows, q.dtype), _gather(kv.v, rows, q.dtype)
    # What an earlier owner left behind a context's end may be anything, and 0 * nan is nan.
    for values in (k, v):
        if group.kept is None:
            values[:, :, -PAGE_TOKENS:].masked_fill_(group.stale, 0)
        else:
            values[:, :, group.kept :].zero_()
    mask = group.mask(heads // kv_heads, q.dtype)
    out = _softmax_attention(q.reshape(count, kv_heads, heads // kv_heads, -1), k, v, mask, rule)
    return out.reshape(count, heads, -1)


def _attend_slice(q: Tensor, kv: LayerKV, batch: Batch, sequence: int, rule: Rule) -> Tensor:
    """Several consecutive queries of one sequence, a block at a time. [n, heads, v_dim]."""
    context = batch.contexts[sequence]
    start = context - q.shape[0]
    first = first_page(start, rule.sliding_window)
    table = batch.page_table[sequence : sequence + 1, first : -(-context // PAGE_TOKENS)].long()
    base = first * PAGE_TOKENS
    rows = head_rows(table, kv.k.shape[1])
    k, v = _gather(kv.k, rows, q.dtype), _gather(kv.v, rows, q.dtype)
    step = max(1, min(256, SCORES // (q.shape[1] * (context - base))))
    out = q.new_empty(*q.shape[:2], kv.v.shape[-1])
    for i in range(0, q.shape[0], step):
        block = q[i : i + step]
        positions = torch.arange(start + i, start + i + block.shape[0])
        low = first_page(start + i, rule.sliding_window) * PAGE_TOKENS
        high = start + i + block.shape[0]
        seen = slice(low - base, high - base)
        visible = visible_keys(positions[None], torch.arange(low, high)[None], rule.sliding_window)
        mask = group_mask(visible, q.shape[1] // k.shape[1], q.dtype)
        out[i : i + step] = _attend_rows(block, k[:, :, seen], v[:, :, seen], mask, rule)
    return out


def _gather(pages: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, heads, 64, D] pages and their [G, heads, n] rows to [G, heads, n * 64, D], in one copy."""
    picked = pages.flatten(0, 1).index_select(0, rows.flatten())
    return picked.view(*rows.shape[:2], -1, pages.shape[-1]).to(dtype)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """q [n, heads, Dk], k [1, kv_heads, L, Dk], v [1, kv_heads, L, Dv] to [n, heads, Dv].

    The queries of a group of heads become rows of one matrix, so that each key is read once.
    """
    rows, heads, _ = q.shape
    kv_heads = k.shape[1]
    packed = q.reshape(rows, kv_heads, heads // kv_heads, -1).permute(1, 2, 0, 3)
    out = _softmax_attention(packed.flatten(1, 2)[None], k, v, mask, rule)
    return out.view(heads, rows, -1).transpose(0, 1)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """q [G, kv_heads, n, Dk], k [G, kv_heads, L, Dk], v [G, kv_heads, L, Dv] to
    [G, kv_heads, n, Dv]. `mask` is a group_mask."""
    if rule.softcap is None and rule.sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scaling)
    return _explicit_attention(q, k, v, mask, rule)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """Scores in float32, for what scaled_dot_product_attention has no argument for."""
    scores = (q.float() @ k.float().mT) * rule.scaling
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores + mask
    if rule.sinks is not None:
        kv_heads = k.shape[1]
        sinks = rule.sinks.float().view(kv_heads, -1)
        sinks = sinks.repeat_interleave(q.shape[2] // sinks.shape[1], dim=1)  # [kv_heads, rows]
        column = sinks[None, :, :, None].expand(len(q), -1, -1, -1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
    return (weights @ v.float()).to(q.dtype)
