"""Paged attention on CUDA: ragged prefill chunks and decodes by one kernel, merged by log-sum-exp.

A program takes a block of rows (the queries of a few tokens times the heads that share a key head,
at least 16, for tl.dot), one key head, and one part of the keys. Sequences with few queries and
those with many are two launches of the same kernel with different tiles, so that decodes do not pay
for the tiles of the prefill chunks beside them. When the keys are split, each part leaves (sum of
weighted values, max, sum of weights), and a second kernel merges the parts.

Which blocks exist follows from sizes the host knows; a program whose block is empty returns, and
nothing waits for the device. Runs on CPUs with TRITON_INTERPRET=1.
"""

# Kernels are Triton's dialect: their arguments are pointers and scalars of a launch.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.runtime.attention import Rule
from headrace.runtime.attention_tiles import (
    MIN_ROWS,
    DeviceLimits,
    Tile,
    choose_splits,
    choose_tile,
    power_of_two,
)
from headrace.runtime.batch import Batch
from headrace.runtime.kv_store import LayerKV
from headrace.scheduler.plan import PAGE_TOKENS

_LOG2_E = 1.4426950408889634


@triton.jit
def _write_kernel(
    k, v, k_pages, v_pages, slots,
    k_token, k_head, v_token, v_head, k_page, k_page_head, v_page, v_page_head,
    HEADS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One token, BLOCK_H heads."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    slot = tl.load(slots + token)
    page = slot // PAGE
    offset = slot % PAGE
    dk = tl.arange(0, BLOCK_K)[None, :]
    dv = tl.arange(0, BLOCK_V)[None, :]
    k_mask = (heads < HEADS) & (dk < DK)
    v_mask = (heads < HEADS) & (dv < DV)
    keys = tl.load(k + token * k_token + heads * k_head + dk, mask=k_mask)
    values = tl.load(v + token * v_token + heads * v_head + dv, mask=v_mask)
    k_to = k_pages + page * k_page + heads * k_page_head + offset * DK + dk
    v_to = v_pages + page * v_page + heads * v_page_head + offset * DV + dv
    tl.store(k_to, keys.to(k_pages.dtype.element_ty), mask=k_mask)
    tl.store(v_to, values.to(v_pages.dtype.element_ty), mask=v_mask)


@triton.jit
def _find(query_start, num_sequences, block, BLOCK_Q: tl.constexpr):
    """The sequence that owns a block: s owns those from query_start[s] // BLOCK_Q + s on."""
    low = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // BLOCK_Q + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _locate(
    query_start, num_sequences, BLOCK_Q: tl.constexpr, ONE: tl.constexpr, SKIP: tl.constexpr
):
    """This program's sequence, its first token's row, its length, and the block's first query.

    ONE: block b is sequence b's only one; longer sequences are left out (length 0).
    Otherwise sequences of at most SKIP tokens are left out, and so are blocks past the end.
    """
    block = tl.program_id(0)
    if ONE:
        sequence = block
        query = block * 0
    else:
        sequence = _find(query_start, num_sequences, block, BLOCK_Q)
        query = (block - tl.load(query_start + sequence) // BLOCK_Q - sequence) * BLOCK_Q
    first = tl.load(query_start + sequence)
    length = tl.load(query_start + sequence + 1) - first
    if ONE:
        length = tl.where(length > BLOCK_Q, 0, length)
    else:
        length = tl.where((length <= SKIP) | (query >= length), 0, length)
    return sequence, first, length, query


@triton.jit(do_not_specialize=["num_sequences", "table_row"])
def _attend_kernel(
    q, k_pages, v_pages, out, partial, stats, sinks, query_start, context, page_table,
    num_sequences, table_row, q_token, q_head, k_page, k_head, v_page, v_head,
    scale, softcap, window,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLITS: tl.constexpr, ONE: tl.constexpr, SKIP: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows (token * GROUP + head in group) against one part of their keys, in base 2."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    sequence, first, length, query = _locate(query_start, num_sequences, BLOCK_Q, ONE, SKIP)
    if length == 0:
        return
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    total = tl.load(context + sequence)

    row = tl.arange(0, BLOCK_M)
    query_of_row = query + row // GROUP
    head = kv_head * GROUP + row % GROUP
    alive = (row < BLOCK_Q * GROUP) & (query_of_row < length)
    token = (first + query_of_row).to(tl.int64)
    position = total - length + query_of_row

    dk = tl.arange(0, BLOCK_K)
    dv = tl.arange(0, BLOCK_V)
    q_at = q + token[:, None] * q_token + head[:, None] * q_head + dk[None, :]
    rows = tl.load(q_at, mask=alive[:, None] & (dk < DK)[None, :], other=0.0)

    # Keys that any row of the block sees, in tiles; this program takes its share of them.
    start = total - length + query
    end = tl.minimum(start + BLOCK_Q, total)
    tile = 0
    if WINDOW:
        tile = tl.maximum(start - window + 1, 0) // BLOCK_N
    tiles = (end + BLOCK_N - 1) // BLOCK_N
    if SPLITS > 1:
        share = (tiles - tile + SPLITS - 1) // SPLITS
        tile += split * share
        tiles = tl.minimum(tiles, tile + share)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    n = tl.arange(0, BLOCK_N)
    table = page_table + sequence.to(tl.int64) * table_row
    for i in range(tile, tiles):
        page = tl.load(table + i * BLOCK_N // PAGE).to(tl.int64)
        offset = i * BLOCK_N % PAGE + n
        key = i * BLOCK_N + n
        # Behind the context's end lies what an earlier owner left, and 0 * nan is nan.
        fresh = key < total
        k_at = k_pages + page * k_page + kv_head * k_head + offset[None, :] * DK + dk[:, None]
        v_at = v_pages + page * v_page + kv_head * v_head + offset[:, None] * DV + dv[None, :]
        keys = tl.load(k_at, mask=fresh[None, :] & (dk < DK)[:, None], other=0.0).to(rows.dtype)
        values = tl.load(v_at, mask=fresh[:, None] & (dv < DV)[None, :], other=0.0).to(rows.dtype)

        score = tl.dot(rows, keys, input_precision="ieee") * scale
        if SOFTCAP:
            decay = tl.exp2(-2.0 * 1.4426950408889634 * tl.abs(score) / softcap)
            bent = softcap * 1.4426950408889634 * (1.0 - decay) / (1.0 + decay)
            score = tl.where(score < 0, -bent, bent)
        visible = key[None, :] <= position[:, None]
        if WINDOW:
            visible = visible & (key[None, :] > position[:, None] - window)
        score = tl.where(visible, score, float("-inf"))

        new_top = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        share_of = tl.exp2(score - base[:, None])
        keep = tl.exp2(top - base)
        weight = weight * keep + tl.sum(share_of, 1)
        acc = acc * keep[:, None]
        acc = tl.dot(share_of.to(rows.dtype), values, acc, input_precision="ieee")
        top = new_top

    if SPLITS > 1:
        part = (tl.program_id(0) * tl.num_programs(1) + kv_head).to(tl.int64) * SPLITS + split
        tl.store(stats + part * 2 * BLOCK_M + row, top)
        tl.store(stats + (part * 2 + 1) * BLOCK_M + row, weight)
        at = (part * BLOCK_M + row[:, None]) * BLOCK_V + dv[None, :]
        tl.store(partial + at, acc)
    else:
        if SINKS:
            sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
            new_top = tl.maximum(top, sink)
            keep = tl.exp2(top - new_top)
            weight = weight * keep + tl.exp2(sink - new_top)
            acc = acc * keep[:, None]
        acc = acc / tl.where(alive, weight, 1.0)[:, None]
        num_heads = tl.num_programs(1) * GROUP
        at = (token[:, None] * num_heads + head[:, None]) * DV + dv[None, :]
        mask = alive[:, None] & (dv < DV)[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_sequences"])
def _merge_kernel(
    out, partial, stats, sinks, query_start, num_sequences,
    GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLITS: tl.constexpr, ONE: tl.constexpr, SKIP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One row: its parts, weighted by their share of the sum of weights."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    _, first, length, query = _locate(query_start, num_sequences, BLOCK_Q, ONE, SKIP)
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    if query + row // GROUP >= length:
        return
    head = kv_head * GROUP + row % GROUP
    split = tl.arange(0, SPLITS)
    dv = tl.arange(0, BLOCK_V)
    part = (tl.program_id(0) * tl.num_programs(1) + kv_head).to(tl.int64) * SPLITS + split
    tops = tl.load(stats + part * 2 * BLOCK_M + row)
    weights = tl.load(stats + (part * 2 + 1) * BLOCK_M + row)
    accs = tl.load(partial + (part * BLOCK_M + row)[:, None] * BLOCK_V + dv[None, :])
    top = tl.max(tops, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    keep = tl.exp2(tops - top)
    weight = tl.sum(weights * keep, 0)
    if SINKS:
        weight += tl.exp2(sink - top)
    result = tl.sum(accs * keep[:, None], 0) / weight
    token = (first + query + row // GROUP).to(tl.int64)
    at = (token * tl.num_programs(1) * GROUP + head) * DV + dv
    tl.store(out + at, result.to(out.dtype.element_ty), mask=dv < DV)


def write(k: Tensor, v: Tensor, kv: LayerKV, batch: Batch) -> None:
    """Put k [T, heads, k_dim] and v [T, heads, v_dim] into their slots."""
    k, v = _rows(k), _rows(v)
    tokens, heads, k_dim = k.shape
    v_dim = v.shape[-1]
    block_k, block_v = power_of_two(k_dim), power_of_two(v_dim)
    block_h = max(1, min(power_of_two(heads), 4096 // max(block_k, block_v)))
    _write_kernel[(tokens, triton.cdiv(heads, block_h))](
        k, v, kv.k, kv.v, batch.token_slots,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        kv.k.stride(0), kv.k.stride(1), kv.v.stride(0), kv.v.stride(1),
        HEADS=heads, DK=k_dim, DV=v_dim,
        BLOCK_H=block_h, BLOCK_K=block_k, BLOCK_V=block_v, PAGE=PAGE_TOKENS,
    )  # fmt: skip


def attend(q: Tensor, kv: LayerKV, batch: Batch, rule: Rule, splits: int | None = None) -> Tensor:
    """Attention of q [T, query_heads, k_dim] over the pages: [T, query_heads, v_dim].

    `splits` (a power of two) cuts the keys into that many parts; by default as many as fill the
    device.
    """
    q = _rows(q)
    out = q.new_empty(*q.shape[:2], kv.v.shape[-1])
    group = q.shape[1] // kv.k.shape[1]
    limits = DeviceLimits.of(q.device)
    short = max(1, MIN_ROWS // group)  # queries that one block of the smallest tile holds
    if batch.min_query <= short:
        _launch(q, kv, batch, rule, out, limits, short, one=True, splits=splits)
    if batch.max_query > short:
        _launch(q, kv, batch, rule, out, limits, short, one=False, splits=splits)
    return out


def _launch(
    q: Tensor, kv: LayerKV, batch: Batch, rule: Rule, out: Tensor, limits: DeviceLimits,
    short: int, *, one: bool, splits: int | None,
) -> None:  # fmt: skip
    """Attend for the sequences of at most `short` queries (`one` block each), or for the others."""
    sequences, kv_heads = len(batch.lengths), kv.k.shape[1]
    group, k_dim, v_dim = q.shape[1] // kv_heads, q.shape[2], kv.v.shape[-1]
    queries = short if one else batch.max_query
    tile = choose_tile(queries, group, k_dim, v_dim, q.element_size(), limits)
    block_q = tile.rows // group
    blocks = sequences if one else q.shape[0] // block_q + sequences
    window = rule.sliding_window
    visible = batch.max_context if window is None else min(batch.max_context, window + block_q)
    parts = splits or choose_splits(blocks * kv_heads, visible, limits)
    partial, stats = _parts(out, blocks * kv_heads * parts if parts > 1 else 0, tile)
    sinks = out if rule.sinks is None else rule.sinks
    scale = rule.scaling if rule.softcap is not None else rule.scaling * _LOG2_E
    flags = {"SPLITS": parts, "ONE": one, "SKIP": short, "SINKS": rule.sinks is not None}
    _attend_kernel[(blocks, kv_heads, parts)](
        q, kv.k, kv.v, out, partial, stats, sinks,
        batch.query_start, batch.context, batch.page_table,
        sequences, batch.page_table.stride(0), q.stride(0), q.stride(1),
        kv.k.stride(0), kv.k.stride(1), kv.v.stride(0), kv.v.stride(1),
        float(scale), float(rule.softcap or 0.0), window or 0,
        GROUP=group, DK=k_dim, DV=v_dim, PAGE=PAGE_TOKENS,
        BLOCK_M=tile.rows, BLOCK_N=tile.keys, BLOCK_K=tile.dim_k, BLOCK_V=tile.dim_v,
        WINDOW=window is not None, SOFTCAP=rule.softcap is not None, **flags,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts > 1:
        _merge_kernel[(blocks, kv_heads, block_q * group)](
            out, partial, stats, sinks, batch.query_start, sequences,
            GROUP=group, DV=v_dim, BLOCK_M=tile.rows, BLOCK_V=tile.dim_v, **flags,
        )  # fmt: skip


def _parts(out: Tensor, count: int, tile: Tile) -> tuple[Tensor, Tensor]:
    """Room for `count` parts: values [count, rows, v_dim], and [count, 2, rows] of (max, sum)."""
    partial = out.new_empty((count, tile.rows, tile.dim_v), dtype=torch.float32)
    return partial, out.new_empty((count, 2, tile.rows), dtype=torch.float32)


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()
