"""Paged attention over ragged micro-batches: torch on CPUs, Triton on CUDA.

A query at position p sees the keys at positions (p - window, p] of its own sequence: transformers'
causal and sliding-window masks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.runtime.kv_store import LayerKV
from headrace.scheduler.plan import PAGE_TOKENS, MicroBatch

_SCORES = 1 << 24
"""Scores that the CPU path holds at once (64 MiB in float32)."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch as attention sees it: T packed tokens of S sequences, R of them sampled.

    positions [T] int64.  token_slots [T] int64: page * 64 + offset, where the token's key goes.
    sample_rows [R] int64: the packed row of each sampling slice's last token.
    query_start [S + 1] int32: where each sequence's tokens begin.  context [S] int32: its tokens
    with this slice's.  page_table [S, P] int32, padded with 0.
    `lengths` and `contexts` are host copies: tokens of each slice, and of each context.
    """

    positions: Tensor
    token_slots: Tensor
    sample_rows: Tensor
    query_start: Tensor
    context: Tensor
    page_table: Tensor
    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    _decodes: "dict[tuple[int | None, int], list[_Decodes]]" = field(default_factory=dict)

    @cached_property
    def page_offsets(self) -> tuple[Tensor, Tensor]:
        """`token_slots` as pages [T] and offsets in them [T]."""
        return self.token_slots // PAGE_TOKENS, self.token_slots % PAGE_TOKENS

    def decodes(self, window: int | None, width: int) -> "list[_Decodes]":
        """The sequences with one query each in groups; alike for all layers of a kind.

        `width` is the elements that one key takes over all query heads.
        """
        key = window, width
        if key not in self._decodes:
            self._decodes[key] = list(_group_decodes(self, window, width))
        return self._decodes[key]

    @cached_property
    def min_query(self) -> int:
        return min(self.lengths)

    @cached_property
    def max_query(self) -> int:
        return max(self.lengths)

    @cached_property
    def max_context(self) -> int:
        return max(self.contexts)

    @classmethod
    def build(cls, micro_batch: MicroBatch, device: torch.device) -> "Batch":
        """One transfer to the device; the caller's stream orders it before its use."""
        slices = micro_batch.slices
        lengths = np.array([len(piece.tokens) for piece in slices])
        ends = np.array([piece.end for piece in slices])
        assert len(slices) and lengths.min() > 0, micro_batch
        start = np.concatenate(([0], lengths.cumsum()))
        sequence = np.repeat(np.arange(len(slices)), lengths)
        positions = np.arange(start[-1]) + (ends - start[1:])[sequence]
        table = _page_table(micro_batch)
        page = table[sequence, positions // PAGE_TOKENS]
        sampled = [i for i, piece in enumerate(slices) if piece.sampling is not None]
        positions_, slots, sample_rows, query_start, context, page_table = _to_device(
            (
                positions,
                page.astype(np.int64) * PAGE_TOKENS + positions % PAGE_TOKENS,
                start[1:][sampled] - 1,
                start.astype(np.int32),
                ends.astype(np.int32),
                table,
            ),
            device,
        )
        return cls(
            positions=positions_,
            token_slots=slots,
            sample_rows=sample_rows,
            query_start=query_start,
            context=context,
            page_table=page_table,
            lengths=tuple(lengths.tolist()),
            contexts=tuple(ends.tolist()),
        )


def _page_table(micro_batch: MicroBatch) -> np.ndarray:
    used = [-(-piece.end // PAGE_TOKENS) for piece in micro_batch.slices]
    table = np.zeros((len(used), max(used)), dtype=np.int32)
    for row, piece, pages in zip(table, micro_batch.slices, used, strict=True):
        assert len(piece.pages) >= pages, piece
        row[:pages] = piece.pages[:pages]
    return table


def _to_device(arrays: tuple[np.ndarray, ...], device: torch.device) -> list[Tensor]:
    """The arrays on `device`, as views of one buffer, each on a 16-byte boundary.

    Aligned, because Triton compiles another kernel for a pointer that is not.
    """
    spans = [-(-array.nbytes // 16) * 16 for array in arrays]
    ends = np.cumsum(spans)
    host = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for array, end, span in zip(arrays, ends, spans, strict=True):
        raw = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        host[end - span : end - span + array.nbytes] = raw
    # The host allocator keeps a pinned block until the copies recorded on it are done.
    packed = host.to(device, non_blocking=True)
    types = {8: torch.int64, 4: torch.int32}
    return [
        packed[end - span : end - span + array.nbytes].view(types[array.itemsize]).view(array.shape)
        for array, end, span in zip(arrays, ends, spans, strict=True)
    ]


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
) -> Tensor:
    """Write k and v into their pages, then attend over the pages.

    q [T, query_heads, k_dim], k [T, kv_heads, k_dim], v [T, kv_heads, v_dim], any strides; returns
    [T, query_heads, v_dim] in q's dtype. Query head h reads key head h // (query_heads / kv_heads).
    A sequence's result does not depend on the other sequences of the batch.
    """
    rule = Rule(scaling, sliding_window, softcap, sinks)
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
    out = q.new_empty(*q.shape[:2], kv.v.shape[-1])
    start = 0
    for sequence, length in enumerate(batch.lengths):
        if length > 1:
            rows = slice(start, start + length)
            out[rows] = _attend_slice(q[rows], kv, batch, sequence, rule)
        start += length
    for group in batch.decodes(rule.sliding_window, q.shape[1] * kv.k.shape[-1]):
        out[group.rows] = _attend_decodes(q[group.rows], kv, group, rule)
    return out


@dataclass(frozen=True, slots=True)
class _Decodes:
    """One query of each of G sequences that see equally many pages, n.

    rows [G]: the queries' places in the batch.  table [G, n]: the pages they see.  stale
    [G, 1, 64, 1]: keys of the last page past the context's end.  visible [G, 1, n * 64].
    """

    rows: Tensor
    table: Tensor
    stale: Tensor
    visible: Tensor


def _group_decodes(batch: Batch, window: int | None, width: int) -> Iterator[_Decodes]:
    """Without padding: batching saves calls and changes no result."""
    alike: dict[int, list[int]] = {}
    for sequence, (length, context) in enumerate(zip(batch.lengths, batch.contexts, strict=True)):
        if length == 1:
            pages = -(-context // PAGE_TOKENS) - _first_page(context - 1, window)
            alike.setdefault(pages, []).append(sequence)
    for pages, members in alike.items():
        at_once = max(1, _SCORES // (pages * PAGE_TOKENS * width))
        for i in range(0, len(members), at_once):
            yield _decode_group(batch, torch.tensor(members[i : i + at_once]), pages, window)


def _decode_group(batch: Batch, members: Tensor, pages: int, window: int | None) -> _Decodes:
    position = batch.context[members].long() - 1  # [G]
    first = position // PAGE_TOKENS + 1 - pages
    table = batch.page_table[members[:, None], first[:, None] + torch.arange(pages)].long()
    keys = first[:, None] * PAGE_TOKENS + torch.arange(pages * PAGE_TOKENS)  # [G, n * 64]
    return _Decodes(
        rows=batch.query_start[members].long(),
        table=table,
        stale=(keys > position[:, None])[:, None, -PAGE_TOKENS:, None],
        visible=_visible(position[:, None], keys, window),
    )


def _first_page(position: int, window: int | None) -> int:
    """The first page that a query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1) // PAGE_TOKENS


def _attend_decodes(q: Tensor, kv: LayerKV, group: _Decodes, rule: Rule) -> Tensor:
    """[G, heads, k_dim] to [G, heads, v_dim]."""
    k, v = _gather(kv.k, group.table, q.dtype), _gather(kv.v, group.table, q.dtype)
    # What an earlier owner left behind a context's end may be anything, and 0 * nan is nan.
    k[:, :, -PAGE_TOKENS:].masked_fill_(group.stale, 0)
    v[:, :, -PAGE_TOKENS:].masked_fill_(group.stale, 0)
    return _softmax_attention(q[:, None], k, v, group.visible, rule)[:, 0]


def _attend_slice(q: Tensor, kv: LayerKV, batch: Batch, sequence: int, rule: Rule) -> Tensor:
    """Several consecutive queries of one sequence, a block at a time. [n, heads, v_dim]."""
    context = batch.contexts[sequence]
    start = context - q.shape[0]
    first = _first_page(start, rule.sliding_window)
    table = batch.page_table[sequence : sequence + 1, first : -(-context // PAGE_TOKENS)].long()
    base = first * PAGE_TOKENS
    k, v = _gather(kv.k, table, q.dtype), _gather(kv.v, table, q.dtype)
    step = max(1, min(256, _SCORES // (q.shape[1] * (context - base))))
    out = q.new_empty(*q.shape[:2], kv.v.shape[-1])
    for i in range(0, q.shape[0], step):
        block = q[i : i + step]
        positions = torch.arange(start + i, start + i + block.shape[0])
        low = _first_page(start + i, rule.sliding_window) * PAGE_TOKENS
        high = start + i + block.shape[0]
        seen = slice(low - base, high - base)
        visible = _visible(positions[None], torch.arange(low, high)[None], rule.sliding_window)
        part = _softmax_attention(block[None], k[:, :, seen], v[:, :, seen], visible, rule)
        out[i : i + step] = part[0]
    return out


def _gather(pages: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, heads, 64, D] pages and a [G, n] table to [G, heads, n * 64, D], in one copy."""
    heads = pages.shape[1]
    rows = table[:, None, :] * heads + torch.arange(heads)[:, None]  # [G, heads, n]
    picked = pages.flatten(0, 1).index_select(0, rows.flatten())
    return picked.view(table.shape[0], heads, -1, pages.shape[-1]).to(dtype)


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Positions [G, n] and [G, L] to a mask [G, n, L], true where the query sees the key."""
    distance = queries[:, :, None] - keys[:, None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, rule: Rule) -> Tensor:
    """q [G, n, heads, Dk], k [G, kv_heads, L, Dk], v [G, kv_heads, L, Dv] to [G, n, heads, Dv].

    The queries of a group of heads become rows of one matrix, so that each key is read once.
    """
    count, rows, heads, _ = q.shape
    group = heads // k.shape[1]
    packed = q.reshape(count, rows, k.shape[1], group, -1)
    packed = packed.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [G, kv_heads, group * n, Dk]
    mask = visible[:, None].repeat(1, 1, group, 1)  # [G, 1, group * n, L]
    if rule.softcap is None and rule.sinks is None:
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=rule.scaling)
    else:
        out = _explicit_attention(packed, k, v, mask, rule)
    out = out.view(count, -1, group, rows, v.shape[-1])
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """Scores in float32, for what scaled_dot_product_attention has no argument for."""
    scores = (q.float() @ k.float().mT) * rule.scaling
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if rule.sinks is not None:
        kv_heads = k.shape[1]
        sinks = rule.sinks.float().view(kv_heads, -1)
        sinks = sinks.repeat_interleave(q.shape[2] // sinks.shape[1], dim=1)  # [kv_heads, rows]
        column = sinks[None, :, :, None].expand(len(q), -1, -1, -1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
    return (weights @ v.float()).to(q.dtype)
