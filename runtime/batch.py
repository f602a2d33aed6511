"""A micro-batch as attention sees it: packed tokens, their pages, and who may look at what."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.runtime.adapters.rows import Segment, segments_of
from headrace.scheduler.plan import PAGE_TOKENS, MicroBatch, Slice

SCORES = 1 << 24
"""Scores that the CPU path holds at once (64 MiB in float32)."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch as attention sees it: T packed tokens of S sequences, R of them sampled.

    positions [T] int64.  token_slots [T] int64: page * 64 + offset, where the token's key goes.
    sample_rows [R] int64: the packed rows of each sampling slice's last token and those before drafts.
    query_start [S + 1] int32: where each sequence's tokens begin.  context [S] int32: its tokens
    with this slice's.  page_table [S, P] int32, padded with 0.  tails [S] int32: each sequence's slot.
    `tokens` [T] int64 stay on the host, pinned for a CUDA device; `lengths` and `contexts` are the tokens of each slice and context.
    `max_context` is at least the longest context. `packed` is the memory of all tensors. `adapters` says which rows run with one.
    """

    tokens: Tensor
    positions: Tensor
    token_slots: Tensor
    sample_rows: Tensor
    query_start: Tensor
    context: Tensor
    page_table: Tensor
    tails: Tensor
    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    max_context: int
    packed: Tensor
    adapters: tuple[Segment, ...] = ()
    _decodes: "dict[tuple[int | None, int], list[Decodes]]" = field(default_factory=dict)

    @cached_property
    def page_offsets(self) -> tuple[Tensor, Tensor]:
        """`token_slots` as pages [T] and offsets in them [T]."""
        return self.token_slots // PAGE_TOKENS, self.token_slots % PAGE_TOKENS

    def decodes(self, window: int | None, width: int) -> "list[Decodes]":
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

    @classmethod
    def build(
        cls, micro_batch: MicroBatch, device: torch.device, pages: int | None = None
    ) -> "Batch":
        """`on_host`, and `to` the device."""
        pinned = device.type == "cuda"
        return cls.on_host(micro_batch, pinned=pinned, pages=pages).to(device)

    @classmethod
    def on_host(cls, micro_batch: MicroBatch, *, pinned: bool, pages: int | None = None) -> "Batch":
        """All tensors in host memory. With `pages`, every sequence is given room for so many."""
        slices = micro_batch.slices
        lengths = np.array([len(piece.tokens) for piece in slices])
        ends = np.array([piece.start for piece in slices]) + lengths
        assert len(slices) and lengths.min() > 0, micro_batch
        start = np.concatenate(([0], lengths.cumsum()))
        sequence = np.repeat(np.arange(len(slices)), lengths)
        positions = np.arange(start[-1]) + (ends - start[1:])[sequence]
        table = _page_table(slices, -(-ends // PAGE_TOKENS), pages)
        page = table[sequence, positions // PAGE_TOKENS]
        sampled = [
            end - before
            for piece, end in zip(slices, start[1:].tolist(), strict=True)
            for before in range(piece.num_drawn, 0, -1)
        ]
        # As many whichever of the slices are sampled.
        sample_rows = np.zeros(max(len(slices), len(sampled)), dtype=np.int64)
        sample_rows[: len(sampled)] = sampled
        packed, views = _pack(
            (
                positions,
                page.astype(np.int64) * PAGE_TOKENS + positions % PAGE_TOKENS,
                start.astype(np.int32),
                ends.astype(np.int32),
                table,
                sample_rows,
                np.array([piece.tail for piece in slices], dtype=np.int32),
            ),
            pinned,
        )
        return cls(
            tokens=_pack((np.array([t for piece in slices for t in piece.tokens]),), pinned)[1][0],
            positions=views[0],
            token_slots=views[1],
            sample_rows=views[5][: len(sampled)],
            query_start=views[2],
            context=views[3],
            page_table=views[4],
            tails=views[6],
            lengths=tuple(lengths.tolist()),
            contexts=tuple(ends.tolist()),
            max_context=int(ends.max()) if pages is None else pages * PAGE_TOKENS,
            packed=packed,
            adapters=segments_of(slices),
        )

    def to(self, device: torch.device, onto: "Batch | None" = None) -> "Batch":
        """One transfer from the host, queued on the current stream.

        `onto` gives its memory, which is that of a batch of as many tokens, sequences and pages.
        """
        there: dict[str, Any]
        # The host allocator keeps a pinned block until the copies recorded on it are done.
        if onto is None:
            packed = self.packed.to(device, non_blocking=True)
            there = {name: _moved(getattr(self, name), packed) for name in _PACKED}
        else:
            assert len(onto.packed) == len(self.packed), "batches of unlike shapes"
            packed = onto.packed.copy_(self.packed, non_blocking=True)
            there = {name: getattr(onto, name) for name in _PACKED}
            there["sample_rows"] = onto.sample_rows.as_strided(self.sample_rows.shape, (1,))
        return replace(self, packed=packed, _decodes={}, **there)


_PACKED = (
    "positions", "token_slots", "sample_rows", "query_start", "context", "page_table", "tails",
)  # fmt: skip


def _page_table(slices: Sequence[Slice], used: np.ndarray, width: int | None) -> np.ndarray:
    have = np.array([len(piece.pages) for piece in slices])
    assert (have >= used).all(), slices
    ids = np.fromiter(chain.from_iterable(piece.pages for piece in slices), np.int32)
    table = np.zeros((len(used), max(width or 0, have.max())), dtype=np.int32)
    column = np.arange(table.shape[1])
    table[column < have[:, None]] = ids
    # A slice may bring pages that its tokens do not reach.
    table[column >= used[:, None]] = 0
    return table[:, : width or used.max()]


def _span(nbytes: int) -> int:
    """Triton compiles another kernel for a pointer that is not aligned."""
    return -(-nbytes // 16) * 16


def _pack(arrays: tuple[np.ndarray, ...], pinned: bool) -> tuple[Tensor, list[Tensor]]:
    """One buffer on the host (uint8), and the arrays as views of it, one after the other."""
    starts = [0, *accumulate(_span(array.nbytes) for array in arrays)]
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
    types = {8: torch.int64, 4: torch.int32}
    views = []
    for array, start in zip(arrays, starts, strict=False):
        part = packed[start : start + array.nbytes].view(types[array.itemsize])
        views.append(part.view(array.shape))
        views[-1].numpy()[...] = array
    return packed, views


def _moved(view: Tensor, copy: Tensor) -> Tensor:
    """What `view` is of a batch's memory, of a `copy` of that."""
    start = view.storage_offset() * view.itemsize
    return copy[start : start + view.nbytes].view(view.dtype).view(view.shape)


@dataclass(frozen=True)
class Decodes:
    """One query of each of G sequences that see equally many pages, n.

    rows [G]: the queries' places in the batch.  table [G, n]: the pages they see.  tails [G]: their
    sequences' slots.  offsets [G]: their places in the last page.  stale
    [G, 1, 64, 1]: keys of the last page past the context's end; `kept` of all pages' keys are not,
    where that is the same for all.  visible [G, 1, n * 64].
    """

    rows: Tensor
    table: Tensor
    tails: Tensor
    offsets: Tensor
    stale: Tensor
    kept: int | None
    visible: Tensor
    _head_rows: dict[int, Tensor] = field(default_factory=dict)
    _masks: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def head_rows(self, heads: int) -> Tensor:
        """`head_rows` of the table, made once for all layers."""
        if heads not in self._head_rows:
            self._head_rows[heads] = head_rows(self.table, heads)
        return self._head_rows[heads]

    def mask(self, group: int, dtype: torch.dtype) -> Tensor:
        """`group_mask` of what is visible, made once for all layers."""
        key = group, dtype
        if key not in self._masks:
            self._masks[key] = group_mask(self.visible, group, dtype)
        return self._masks[key]


def _group_decodes(batch: Batch, window: int | None, width: int) -> Iterator[Decodes]:
    """Without padding: batching saves calls and changes no result."""
    alike: dict[int, list[int]] = {}
    for sequence, (length, context) in enumerate(zip(batch.lengths, batch.contexts, strict=True)):
        if length == 1:
            pages = -(-context // PAGE_TOKENS) - first_page(context - 1, window)
            alike.setdefault(pages, []).append(sequence)
    for pages, members in alike.items():
        at_once = max(1, SCORES // (pages * PAGE_TOKENS * width))
        for i in range(0, len(members), at_once):
            yield _decode_group(batch, torch.tensor(members[i : i + at_once]), pages, window)


def _decode_group(batch: Batch, members: Tensor, pages: int, window: int | None) -> Decodes:
    position = batch.context[members].long() - 1  # [G]
    first = position // PAGE_TOKENS + 1 - pages
    table = batch.page_table[members[:, None], first[:, None] + torch.arange(pages)].long()
    keys = first[:, None] * PAGE_TOKENS + torch.arange(pages * PAGE_TOKENS)  # [G, n * 64]
    kept = position + 1 - first * PAGE_TOKENS
    return Decodes(
        rows=batch.query_start[members].long(),
        table=table,
        tails=batch.tails[members].long(),
        offsets=position % PAGE_TOKENS,
        kept=int(kept[0]) if bool((kept == kept[0]).all()) else None,
        stale=(keys > position[:, None])[:, None, -PAGE_TOKENS:, None],
        visible=visible_keys(position[:, None], keys, window),
    )


def first_page(position: int, window: int | None) -> int:
    """The first page that a query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1) // PAGE_TOKENS


def visible_keys(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Positions [G, n] and [G, L] to a mask [G, n, L], true where the query sees the key."""
    distance = queries[:, :, None] - keys[:, None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def head_rows(table: Tensor, heads: int) -> Tensor:
    """[G, n] pages to [G, heads, n] places in pages seen as [pages * heads, ...]."""
    return table[:, None, :] * heads + torch.arange(heads)[:, None]


def group_mask(visible: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """[G, n, L] to [G, 1, group * n, L], for `group` query heads that share a key head: what is added
    to scores, 0 or -inf, which scaled_dot_product_attention would otherwise make at each call."""
    added = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
    return added[:, None].repeat(1, 1, group, 1)
