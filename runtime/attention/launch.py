"""Paged attention on CUDA: ragged prefill chunks and decodes by one kernel, merged by log-sum-exp.

A program takes a block of rows (the queries of a few tokens times the heads that share a key head, or
as many of these as it has room for; at least 16, for tl.dot), one key head, and one part of the keys.
Sequences with few queries and those with many are two launches of the same kernel with different tiles,
so that decodes do not pay for the tiles of the prefill chunks beside them. When the keys are split, each
part leaves (sum of weighted values, max, sum of weights), and a second kernel merges the parts.

Which blocks exist follows from sizes the host knows; a program whose block is empty returns, and
nothing waits for the device. Runs on CPUs with TRITON_INTERPRET=1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.runtime.attention.code_words import unpacking
from headrace.runtime.attention.kernels import attend_kernel, merge_kernel
from headrace.runtime.attention.softmax import Rule
from headrace.runtime.attention.tiles import (
    MIN_ROWS,
    DeviceLimits,
    Tile,
    choose_latent_tile,
    choose_splits,
    choose_tile,
    heads_at_once,
    power_of_two,
    widened,
)
from headrace.runtime.batch import Batch
from headrace.runtime.kv.store import LayerKV, QuantizedKV
from headrace.runtime.kv.write_triton import fill, keep, rows
from headrace.scheduler.plan import PAGE_TOKENS

_LOG2_E = 1.4426950408889634


def attend_newest(
    q: Tensor, k: Tensor, v: Tensor, kv: QuantizedKV, batch: Batch, rule: Rule
) -> Tensor:
    """Attend, quantize the pages that k and v fill, and keep the rest of them in tails.

    Shapes are paged_attention's, types the compute type; q and k are rotated.
    """
    k, v = rows(k), rows(v)
    fill(k, v, kv, batch)
    out = attend(q, kv, batch, rule, newest=(k, v))
    keep(k, v, kv, batch)
    return out


@dataclass(frozen=True, slots=True)
class _Reads:
    """Where attend_kernel reads keys and values, in the order of its arguments."""

    bits: int
    tensors: tuple[Tensor, ...]
    strides: tuple[int, ...]


def _reads(kv: LayerKV | QuantizedKV, newest: tuple[Tensor, Tensor] | None) -> _Reads:
    if isinstance(kv, LayerKV):
        # There are no scales, and neither new ones nor tails are read.
        return _Reads(16, (kv.k, kv.v) * 4, _strides(kv.k, kv.v) * 2)
    assert newest is not None
    # Words of 16 bits, as wide as scales are.
    codes = kv.k.codes.view(torch.int16), kv.v.codes.view(torch.int16)
    tails = kv.k.tails, kv.v.tails
    tensors = (*codes, kv.k.scales, kv.v.scales, *newest, *tails)
    return _Reads(kv.k.fmt.bits, tensors, _strides(*codes) + _strides(*newest))


def _strides(k: Tensor, v: Tensor) -> tuple[int, ...]:
    """From page to page, or token to token, and from head to head."""
    return k.stride(0), k.stride(1), v.stride(0), v.stride(1)


def attend(
    q: Tensor, kv: LayerKV | QuantizedKV, batch: Batch, rule: Rule,
    splits: int | None = None, tile: Tile | None = None, newest: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q [T, query_heads, k_dim] over the pages: [T, query_heads, v_dim].

    Where pages keep latents, a query is as wide as a value and a key. Where they are quantized, `newest` are the batch's keys and values, which are not in tails yet.

    `splits` cuts the keys into that many parts; by default as many as fill the device. `tile` is
    used for all sequences; by default one for those of few queries, and one for the others.
    """
    assert rule.scaling > 0, rule  # the largest product is the largest score
    q = rows(q)
    assert (newest is None) == isinstance(kv, LayerKV)
    out = q.new_empty(*q.shape[:2], kv.v_dim)
    short = short_queries(q.shape[1] // kv.kv_heads)
    reads = _reads(kv, newest)
    if batch.min_query <= short:
        _launch(q, kv, batch, rule, out, short, reads, one=True, splits=splits, tile=tile)
    if batch.max_query > short:
        _launch(q, kv, batch, rule, out, short, reads, one=False, splits=splits, tile=tile)
    return out


def short_queries(group: int) -> int:
    """Queries that one block of the smallest tile holds."""
    return max(1, MIN_ROWS // group)


def choose(
    q: Tensor, kv: LayerKV | QuantizedKV, batch: Batch, rule: Rule, *, one: bool,
    tile: Tile | None = None,
) -> tuple[Tile, int]:  # fmt: skip
    """The tile, unless it is given, and the number of splits of one of attend's two launches.

    `one`: that for sequences of few queries.
    """
    kv_heads, window, visible = kv.kv_heads, rule.sliding_window, batch.max_context
    group = q.shape[1] // kv_heads
    queries = min(short_queries(group), batch.max_query) if one else batch.max_query
    limits = DeviceLimits.of(q.device)
    shape = group, kv.k_dim, kv.v_dim, q.element_size(), limits
    bits = 16 if isinstance(kv, LayerKV) else kv.k.fmt.bits
    if tile is None and kv.latent:
        tile = choose_latent_tile(queries, *shape)
    elif tile is None:
        seen = visible if window is None else min(visible, window + queries)
        tile = choose_tile(queries, seen, *shape, bits)
    at_once = heads_at_once(group, tile)
    block_q = tile.rows // at_once
    seen = visible if window is None else min(visible, window + block_q)
    blocks = len(batch.lengths)
    if not one:
        blocks = max(blocks, -(-q.shape[0] // block_q))
    return tile, choose_splits(blocks * (q.shape[1] // at_once), seen, tile, limits, bits)


def _launch(
    q: Tensor, kv: LayerKV | QuantizedKV, batch: Batch, rule: Rule, out: Tensor, short: int,
    reads: _Reads, *, one: bool, splits: int | None, tile: Tile | None,
) -> None:  # fmt: skip
    """Attend for the sequences of at most `short` queries (`one` block each), or for the others."""
    sequences, kv_heads, window = len(batch.lengths), kv.kv_heads, rule.sliding_window
    chosen, parts = choose(q, kv, batch, rule, one=one, tile=tile)
    tile, splits = widened(chosen, reads.bits), splits or parts
    group = heads_at_once(q.shape[1] // kv_heads, tile)
    groups, block_q = q.shape[1] // group, tile.rows // group
    blocks = sequences if one else q.shape[0] // block_q + sequences
    partial, stats = _parts(out, blocks * groups * splits, tile) if splits > 1 else (out, out)
    sinks = out if rule.sinks is None else rule.sinks
    scale = rule.scaling if rule.softcap is not None else rule.scaling * _LOG2_E
    asm, constraints = _unpacking(reads.bits, q)
    flags = {"GROUP": group, "ONE": one, "SKIP": short, "SINKS": rule.sinks is not None}
    attend_kernel[(blocks, groups, splits)](
        q, *reads.tensors, out, partial, stats, sinks,
        batch.query_start, batch.context, batch.page_table, batch.tails,
        sequences, batch.page_table.stride(0), q.stride(0), q.stride(1), *reads.strides,
        float(scale), float(rule.softcap or 0.0), window or 0, splits,
        BITS=reads.bits, LATENT=kv.latent, BLOCKS=groups // kv_heads,
        DK=kv.k_dim, DV=kv.v_dim, PAGE=PAGE_TOKENS,
        BLOCK_M=tile.rows, BLOCK_N=tile.keys, BLOCK_K=tile.dim_k, BLOCK_V=tile.dim_v,
        SPLIT=splits > 1, PEEL=tile.peel and window is None,
        WINDOW=window is not None, SOFTCAP=rule.softcap is not None,
        ASM=asm, CONSTRAINTS=constraints, **flags,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        block_s = power_of_two(splits)
        merge_kernel[(blocks, groups, min(block_q, batch.max_query) * group)](
            out, partial, stats, sinks, batch.query_start, sequences, splits,
            DV=kv.v_dim, BLOCK_M=tile.rows, BLOCK_V=tile.dim_v, BLOCK_S=block_s, **flags,
            num_warps=8 if block_s * tile.dim_v > 1 << 14 else 4,
        )  # fmt: skip


def _unpacking(bits: int, q: Tensor) -> tuple[str, str]:
    """PTX for codes of quantized pages; blank where there are none, and in the interpreter."""
    return (bits < 16 and q.is_cuda and unpacking(bits, q.dtype)) or ("", "")


def _parts(out: Tensor, count: int, tile: Tile) -> tuple[Tensor, Tensor]:
    """Room for `count` parts: values [count, rows, v_dim], and [count, rows, 2] of (max, sum)."""
    partial = out.new_empty((count, tile.rows, tile.dim_v), dtype=torch.float32)
    return partial, out.new_empty((count, tile.rows, 2), dtype=torch.float32)
