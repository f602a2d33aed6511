"""Attention over quantized pages in torch, on CPUs. kv/store.py says what a query sees.

In float32 a query gets the same bits however its prompt was cut: those that see the same pages are
multiplied with all keys of these, of which masks hide what comes later, and a row's sums do not
depend on the rows beside it (headrace.runtime).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

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
from headrace.runtime.kv.codes import dequantize, quantize
from headrace.runtime.kv.store import Coded, QuantizedKV, whole_keys
from headrace.scheduler.pages import pages_for
from headrace.scheduler.plan import PAGE_TOKENS


def attend_newest(
    q: Tensor, k: Tensor, v: Tensor, kv: QuantizedKV, batch: Batch, rule: Rule
) -> Tensor:
    """Attend, quantize the pages that k and v fill, and keep the rest of them in tails.

    Shapes are paged_attention's, types the compute type; q and k are rotated.
    """
    out = q.new_empty(*q.shape[:2], kv.v_dim)
    start = 0
    for sequence, length in enumerate(batch.lengths):
        if length > 1:
            rows = slice(start, start + length)
            out[rows] = _attend_slice(q[rows], k[rows], v[rows], kv, batch, sequence, rule)
        start += length
    for group in batch.decodes(rule.sliding_window, q.shape[1] * q.shape[2]):
        few = group.rows
        out[few] = _attend_decodes(q[few], k[few], v[few], kv, group, rule)
    return out


def _attend_decodes(
    q: Tensor, k: Tensor, v: Tensor, kv: QuantizedKV, group: Decodes, rule: Rule
) -> Tensor:
    """[G, heads, k_dim] to [G, heads, v_dim]."""
    keys, values = _decoded(kv.k, k, group), _decoded(kv.v, v, group)
    keys = whole_keys(kv, keys, values)
    mask = group.mask(q.shape[1] // kv.kv_heads, q.dtype)
    packed = q.reshape(len(q), kv.kv_heads, q.shape[1] // kv.kv_heads, -1)
    return softmax_attention(packed, keys, values, mask, rule).reshape(*q.shape[:2], -1)


def _decoded(side: Coded, x: Tensor, group: Decodes) -> Tensor:
    """Takes the newest keys x [G, heads, dim] in; all that their pages hold [G, heads, n * 64, dim]."""
    own = side.tails[group.tails]
    own[torch.arange(len(x)), :, group.offsets] = x
    side.tails[group.tails, :, group.offsets] = x
    full = group.offsets == PAGE_TOKENS - 1
    if full.any():
        _fill(side, own[full], group.table[full, -1])
    # What an earlier owner left behind a context's end may be anything, and 0 * nan is nan.
    own.masked_fill_(group.stale, 0)
    return torch.cat([_read(side, group.table[:, :-1]), own], dim=2)


def _attend_slice(
    q: Tensor, k: Tensor, v: Tensor, kv: QuantizedKV, batch: Batch, sequence: int, rule: Rule
) -> Tensor:
    """Several consecutive queries of one sequence, page by page. [n, heads, v_dim]."""
    context, window = batch.contexts[sequence], rule.sliding_window
    start = context - len(q)
    first = first_page(start, window)
    table = batch.page_table[sequence : sequence + 1, first : pages_for(context)].long()
    tail = int(batch.tails[sequence])
    base, group = first * PAGE_TOKENS, q.shape[1] // kv.kv_heads
    taken = [_taken(side, x, table, tail, start - base) for side, x in ((kv.k, k), (kv.v, v))]
    out = q.new_empty(*q.shape[:2], kv.v_dim)
    for a, b in _runs(start, context, window, max(1, SCORES // (q.shape[1] * (context - base)))):
        low, high = first_page(a, window) * PAGE_TOKENS, pages_for(b) * PAGE_TOKENS
        keys, values = (_seen(exact, coded, low - base, high - base) for exact, coded in taken)
        keys = whole_keys(kv, keys, values)
        visible = visible_keys(torch.arange(a, b)[None], torch.arange(low, high)[None], window)
        mask = group_mask(visible, group, q.dtype)
        rows = slice(a - start, b - start)
        out[rows] = attend_rows(q[rows], keys, values, mask, rule)
    return out


def _taken(side: Coded, x: Tensor, table: Tensor, tail: int, start: int) -> tuple[Tensor, Tensor]:
    """Takes in a slice's keys x [n, heads, dim] that begin at `start` in the pages of `table` [1, m].

    Returns keys of all pages [1, heads, m * 64, dim]: as computed from the slice's first page on and
    blank before; and quantized, blank where pages are not full.
    """
    end, past = start + len(x), start % PAGE_TOKENS
    begin, full = start // PAGE_TOKENS, end // PAGE_TOKENS
    exact = x.new_zeros(1, x.shape[1], table.shape[1] * PAGE_TOKENS, x.shape[2])
    exact[0, :, start - past : start] = side.tails[tail, :, :past]
    exact[0, :, start:end] = x.transpose(0, 1)
    pages = exact[0].unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1)  # [m, heads, 64, dim]
    _fill(side, pages[begin:full], table[0, begin:full])
    left = end % PAGE_TOKENS
    side.tails[tail, :, :left] = exact[0, :, end - left : end]
    return exact, _read(side, table[:, :full])


def _runs(start: int, end: int, window: int | None, most: int) -> Iterator[tuple[int, int]]:
    """[start, end) in parts of at most `most` queries that see the same pages."""
    while start < end:
        stop = min(end, start // PAGE_TOKENS * PAGE_TOKENS + PAGE_TOKENS, start + most)
        if window is not None:
            stop = min(stop, (first_page(start, window) + 1) * PAGE_TOKENS + window - 1)
        yield start, stop
        start = stop


def _seen(exact: Tensor, coded: Tensor, low: int, high: int) -> Tensor:
    """Keys [low, high) of `_taken`: the last page as computed, and those before quantized."""
    own = high - PAGE_TOKENS
    return torch.cat([coded[:, :, low:own], exact[:, :, own:high]], dim=2)


def _fill(side: Coded, x: Tensor, pages: Tensor) -> None:
    """x [m, heads, 64, dim] as pages [m]."""
    codes, scales = quantize(x, side.fmt)
    side.codes[pages] = codes
    side.scales[pages] = scales.mT


def _read(side: Coded, table: Tensor) -> Tensor:
    """Pages [G, n] as [G, heads, n * 64, dim] in the compute type."""
    heads, dim = side.tails.shape[1], side.tails.shape[-1]
    rows = head_rows(table, heads).flatten()
    codes = side.codes.flatten(0, 1).index_select(0, rows)
    scales = side.scales.flatten(0, 1).index_select(0, rows)
    found = dequantize(codes, scales.mT, side.fmt).to(side.tails.dtype)
    return found.view(len(table), heads, table.shape[1] * PAGE_TOKENS, dim)
