"""Paged attention on CUDA: ragged prefill chunks and decodes by one kernel, merged by log-sum-exp.

A program takes a block of rows (the queries of a few tokens times the heads that share a key head,
at least 16, for tl.dot), one key head, and one part of the keys. Sequences with few queries and
those with many are two launches of the same kernel with different tiles, so that decodes do not pay
for the tiles of the prefill chunks beside them. When the keys are split, each part leaves (sum of
weighted values, max, sum of weights), and a second kernel merges the parts.

Which blocks exist follows from sizes the host knows; a program whose block is empty returns, and
nothing waits for the device. Runs on CPUs with TRITON_INTERPRET=1.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.runtime.attention import Rule
from headrace.runtime.attention_kernels import attend_kernel, merge_kernel
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


def attend(
    q: Tensor, kv: LayerKV, batch: Batch, rule: Rule,
    splits: int | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q [T, query_heads, k_dim] over the pages: [T, query_heads, v_dim].

    `splits` cuts the keys into that many parts; by default as many as fill the device. `tile` is
    used for all sequences; by default one for those of few queries, and one for the others.
    """
    assert rule.scaling > 0, rule  # the largest product is the largest score
    q = _rows(q)
    out = q.new_empty(*q.shape[:2], kv.v.shape[-1])
    short = short_queries(q.shape[1] // kv.k.shape[1])
    if batch.min_query <= short:
        _launch(q, kv, batch, rule, out, short, one=True, splits=splits, tile=tile)
    if batch.max_query > short:
        _launch(q, kv, batch, rule, out, short, one=False, splits=splits, tile=tile)
    return out


def short_queries(group: int) -> int:
    """Queries that one block of the smallest tile holds."""
    return max(1, MIN_ROWS // group)


def choose(
    q: Tensor, kv: LayerKV, batch: Batch, rule: Rule, *, one: bool, tile: Tile | None = None
) -> tuple[Tile, int]:
    """The tile, unless it is given, and the number of splits of one of attend's two launches.

    `one`: that for sequences of few queries.
    """
    kv_heads, window, visible = kv.k.shape[1], rule.sliding_window, batch.max_context
    group, v_dim = q.shape[1] // kv_heads, kv.v.shape[-1]
    queries = min(short_queries(group), batch.max_query) if one else batch.max_query
    limits = DeviceLimits.of(q.device)
    if tile is None:
        seen = visible if window is None else min(visible, window + queries)
        tile = choose_tile(queries, seen, group, q.shape[2], v_dim, q.element_size(), limits)
    block_q = tile.rows // group
    seen = visible if window is None else min(visible, window + block_q)
    blocks = len(batch.lengths)
    if not one:
        blocks = max(blocks, -(-q.shape[0] // block_q))
    return tile, choose_splits(blocks * kv_heads, seen, tile, limits)


def _launch(
    q: Tensor, kv: LayerKV, batch: Batch, rule: Rule, out: Tensor, short: int, *,
    one: bool, splits: int | None, tile: Tile | None,
) -> None:  # fmt: skip
    """Attend for the sequences of at most `short` queries (`one` block each), or for the others."""
    sequences, kv_heads, window = len(batch.lengths), kv.k.shape[1], rule.sliding_window
    group, k_dim, v_dim = q.shape[1] // kv_heads, q.shape[2], kv.v.shape[-1]
    chosen, parts = choose(q, kv, batch, rule, one=one, tile=tile)
    tile, splits = chosen, splits or parts
    block_q = tile.rows // group
    blocks = sequences if one else q.shape[0] // block_q + sequences
    partial, stats = _parts(out, blocks * kv_heads * splits, tile) if splits > 1 else (out, out)
    sinks = out if rule.sinks is None else rule.sinks
    scale = rule.scaling if rule.softcap is not None else rule.scaling * _LOG2_E
    flags = {"GROUP": group, "ONE": one, "SKIP": short, "SINKS": rule.sinks is not None}
    attend_kernel[(blocks, kv_heads, splits)](
        q, kv.k, kv.v, out, partial, stats, sinks,
        batch.query_start, batch.context, batch.page_table,
        sequences, batch.page_table.stride(0), q.stride(0), q.stride(1),
        kv.k.stride(0), kv.k.stride(1), kv.v.stride(0), kv.v.stride(1),
        float(scale), float(rule.softcap or 0.0), window or 0, splits,
        DK=k_dim, DV=v_dim, PAGE=PAGE_TOKENS,
        BLOCK_M=tile.rows, BLOCK_N=tile.keys, BLOCK_K=tile.dim_k, BLOCK_V=tile.dim_v,
        SPLIT=splits > 1, PEEL=tile.peel and window is None,
        WINDOW=window is not None, SOFTCAP=rule.softcap is not None, **flags,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(blocks, kv_heads, min(block_q, batch.max_query) * group)](
            out, partial, stats, sinks, batch.query_start, sequences, splits,
            DV=v_dim, BLOCK_M=tile.rows, BLOCK_V=tile.dim_v, BLOCK_S=power_of_two(splits), **flags,
        )  # fmt: skip


def _parts(out: Tensor, count: int, tile: Tile) -> tuple[Tensor, Tensor]:
    """Room for `count` parts: values [count, rows, v_dim], and [count, rows, 2] of (max, sum)."""
    partial = out.new_empty((count, tile.rows, tile.dim_v), dtype=torch.float32)
    return partial, out.new_empty((count, tile.rows, 2), dtype=torch.float32)


def _rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()
