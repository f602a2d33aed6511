"""Paged attention over ragged micro-batches: torch on CPUs, Triton on CUDA.

A query at position p sees the keys at positions (p - window, p] of its own sequence: transformers'
causal and sliding-window masks.
"""

import torch
from torch import Tensor

from headrace.runtime.attention.quantized import attend_newest
from headrace.runtime.attention.softmax import Rule, attend_rows, softmax_attention
from headrace.runtime.batch import (
    SCORES,
    Batch,
    Decodes,
    first_page,
    group_mask,
    head_rows,
    visible_keys,
)
from headrace.runtime.kv.store import LayerKV, QuantizedKV, whole_keys
from headrace.runtime.trace import NULL_TRACER, Kind, Tracer
from headrace.scheduler.plan import PAGE_TOKENS


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: LayerKV | QuantizedKV,
    batch: Batch,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tracer: Tracer = NULL_TRACER,
) -> Tensor:
    """Write k and v into their pages and attend over the pages. What a query sees is kv/store.py's rule.

    q [T, query_heads, k_dim], k [T, kv_heads, k_dim], v [T, kv_heads, v_dim], any strides; returns
    [T, query_heads, v_dim] in q's dtype. Query head h reads key head h // (query_heads / kv_heads).
    Where kv is latent, k has what follows v in a key, and q is [T, query_heads, v_dim + k_dim].
    A sequence's result does not depend on the other sequences of the batch.
    """
    rule = Rule(scaling, sliding_window, softcap, sinks)
    with tracer.span(Kind.ATTENTION):
        if isinstance(kv, QuantizedKV):
            return _attend_quantized(q, k, v, kv, batch, rule)
        if q.is_cuda:
            # Imported where they are needed: installations without a GPU have no Triton.
            from headrace.runtime.attention import launch
            from headrace.runtime.kv import write_triton

            write_triton.write(k, v, kv, batch)
            return launch.attend(q, kv, batch, rule)
        _write(k, v, kv, batch)
        return _attend(q, kv, batch, rule)


def _attend_quantized(
    q: Tensor, k: Tensor, v: Tensor, kv: QuantizedKV, batch: Batch, rule: Rule
) -> Tensor:
    """In the compute type, to which keys and values are rounded where they are not of it."""
    queries, k, v = kv.rotate(*(x.to(kv.dtype) for x in (q, k, v)))
    if q.is_cuda:
        from headrace.runtime.attention import launch

        out = launch.attend_newest(queries, k, v, kv, batch, rule)
    else:
        out = attend_newest(queries, k, v, kv, batch, rule)
    return kv.rotate_back(out).to(q.dtype)


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
    k = whole_keys(kv, k, v)
    out = softmax_attention(q.reshape(count, kv_heads, heads // kv_heads, -1), k, v, mask, rule)
    return out.reshape(count, heads, -1)


def _attend_slice(q: Tensor, kv: LayerKV, batch: Batch, sequence: int, rule: Rule) -> Tensor:
    """Several consecutive queries of one sequence, a block at a time. [n, heads, v_dim]."""
    context = batch.contexts[sequence]
    start = context - q.shape[0]
    first = first_page(start, rule.sliding_window)
    table = batch.page_table[sequence : sequence + 1, first : -(-context // PAGE_TOKENS)].long()
    base = first * PAGE_TOKENS
    rows = head_rows(table, kv.k.shape[1])
    v = _gather(kv.v, rows, q.dtype)
    k = whole_keys(kv, _gather(kv.k, rows, q.dtype), v)
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
        out[i : i + step] = attend_rows(block, k[:, :, seen], v[:, :, seen], mask, rule)
    return out


def _gather(pages: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, heads, 64, D] pages and their [G, heads, n] rows to [G, heads, n * 64, D], in one copy."""
    picked = pages.flatten(0, 1).index_select(0, rows.flatten())
    return picked.view(*rows.shape[:2], -1, pages.shape[-1]).to(dtype)
