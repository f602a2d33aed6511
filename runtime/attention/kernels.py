"""The kernels of paged attention; see launch.py.

Rows of a block are queries (token * GROUP + head in group) and keys come in tiles of BLOCK_N. Scores
are in base 2. Runs on CPUs with TRITON_INTERPRET=1.
"""

# Kernels are Triton's dialect: their arguments are pointers and scalars of a launch.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from headrace.runtime.attention.blocks import locate, share_of
from headrace.runtime.attention.codes import attend_codes, dims_of
from headrace.runtime.attention.loads import load_exact, load_queries, load_tile, pages_of
from headrace.runtime.attention.shares import shares


@triton.jit
def _add(
    acc, top, weight, rows, common, keys, values, key, since, until, scale, softcap,
    LATENT: tl.constexpr, SINCE: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to (sum of weighted values, max, sum of weights).

    LATENT: values are parts of keys too, which `common` of the queries are multiplied with.
    """
    score = tl.dot(rows, tl.trans(keys), input_precision="ieee")
    if LATENT:
        score = tl.dot(common, tl.trans(values), score, input_precision="ieee")
    share, keep, top, weight = shares(
        score, top, weight, key, since, until, scale, softcap, SINCE, SOFTCAP, MASKED
    )
    acc = acc * keep[:, None]
    acc = tl.dot(share.to(rows.dtype), values, acc, input_precision="ieee")
    return acc, top, weight


@triton.jit
def _attend_tiles(
    acc, top, weight, rows, common, since, until, tile, tiles, total, table,
    k_pages, v_pages, k_page, v_page, scale, softcap,
    LATENT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SINCE: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`_add` for tiles [tile, tiles) of pages, which hold `total` keys."""
    last = tl.maximum(total - 1, 0) // PAGE
    page = pages_of(table, tile, last, BLOCK_N, PAGE)
    for i in range(tile, tiles):
        # Read a tile ahead: in the same step, keys and values would wait for it, and Triton would
        # spend the pipeline's stages on it.
        next_page = pages_of(table, i + 1, last, BLOCK_N, PAGE)
        key = i * BLOCK_N + tl.arange(0, BLOCK_N)
        fresh = key < total
        # Behind the context's end lies what an earlier owner left. Scores of such keys are
        # replaced, but 0 * nan is nan, so values are masked.
        keys = load_tile(
            k_pages, page, k_page, i, fresh, rows.dtype, False, DK, BLOCK_K, BLOCK_N, PAGE
        )
        values = load_tile(
            v_pages, page, v_page, i, fresh, rows.dtype, MASKED, DV, BLOCK_V, BLOCK_N, PAGE
        )
        acc, top, weight = _add(
            acc, top, weight, rows, common, keys, values, key, since, until, scale, softcap,
            LATENT, SINCE, SOFTCAP, MASKED,
        )  # fmt: skip
        page = next_page
    return acc, top, weight


@triton.jit
def _attend_pages(
    rows, common, since, until, tile, seen, tiles, total, table, k_pages, v_pages,
    k_page, v_page, scale, softcap,
    LATENT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SINCE: tl.constexpr, SOFTCAP: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Rows against tiles [tile, tiles) of plain pages; with PEEL, every row sees those before `seen`."""
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if PEEL:
        acc, top, weight = _attend_tiles(
            acc, top, weight, rows, common, since, until, tile, seen, total, table,
            k_pages, v_pages, k_page, v_page, scale, softcap,
            LATENT, DK, DV, PAGE, BLOCK_N, BLOCK_K, BLOCK_V, SINCE, SOFTCAP, False,
        )  # fmt: skip
        tile = seen
    return _attend_tiles(
        acc, top, weight, rows, common, since, until, tile, tiles, total, table,
        k_pages, v_pages, k_page, v_page, scale, softcap,
        LATENT, DK, DV, PAGE, BLOCK_N, BLOCK_K, BLOCK_V, SINCE, SOFTCAP, True,
    )  # fmt: skip


@triton.jit
def _attend_exact(
    acc, top, weight, rows, common, since, until, tile, tiles, first, begin, total,
    dk, dv, k, v, k_tail, v_tail, k_token, v_token, scale, softcap,
    LATENT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`_add` for tiles [tile, tiles) of the rows' own pages, as computed: their numbers dk and dv."""
    for i in tl.range(tile, tiles, num_stages=1):  # few: nothing to load ahead
        key = i * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = load_exact(k, k_token, k_tail, first, begin, total, key, dk, DK, PAGE)
        values = load_exact(v, v_token, v_tail, first, begin, total, key, dv, DV, PAGE)
        acc, top, weight = _add(
            acc, top, weight, rows, common, keys.to(rows.dtype), values.to(rows.dtype), key,
            since, until, scale, softcap, LATENT, True, SOFTCAP, True,
        )  # fmt: skip
    return acc, top, weight


@triton.jit
def _keys_of(
    start, end, total, position, window,
    BITS: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """What a block, whose queries are at [start, end), sees of pages: the keys [since, until) of each
    row, those before `seen` all rows; `in_pages` keys, in tiles [tile, tiles). And of the rows' own
    pages, where those are quantized: tiles [own, own_end).
    """
    since = position - window + 1 if WINDOW else position * 0
    if BITS > 8:
        until = position + 1
        seen = start + 1
        in_pages = total
        tiles = tl.cdiv(end, BLOCK_N)
        own, own_end = 0, 0
    else:
        until = position // PAGE * PAGE
        seen = start // PAGE * PAGE
        in_pages = (end - 1) // PAGE * PAGE
        tiles = tl.cdiv(in_pages, BLOCK_N)
        own = seen // BLOCK_N
        own_end = tl.cdiv(end, BLOCK_N)
    tile = tl.minimum(tl.maximum(start - window + 1, 0) // BLOCK_N, tiles) if WINDOW else 0
    return since, until, seen, in_pages, tile, tiles, own, own_end


@triton.jit
def _store(
    acc, top, weight, out, partial, stats, sinks, part, to, head, dv, alive,
    DV: tl.constexpr, BLOCK_V: tl.constexpr, SPLIT: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Rows' results, from `to` on of `out`; with SPLIT, what merge_kernel needs of their `part`."""
    mask = alive[:, None] if DV == BLOCK_V else alive[:, None] & (dv < DV)[None, :]
    if SPLIT:
        tl.store(stats + 2 * part, top, mask=alive)
        tl.store(stats + 2 * part + 1, weight, mask=alive)
        tl.store(partial + part[:, None] * BLOCK_V + dv[None, :], acc, mask=mask)
    else:
        if SINKS:
            # A logit that takes weight and gives no value.
            sink = tl.load(sinks + head, mask=alive, other=0.0).to(tl.float32) * 1.4426950408889634
            new_top = tl.maximum(top, sink)
            keep = tl.exp2(top - new_top)
            weight = weight * keep + tl.exp2(sink - new_top)
            acc = acc * keep[:, None]
        acc = acc / tl.where(alive, weight, 1.0)[:, None]
        tl.store(out + to[:, None] + dv[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_sequences", "table_row", "window", "splits"])
def attend_kernel(
    q, k_pages, v_pages, k_scales, v_scales, k, v, k_tails, v_tails, out, partial, stats, sinks,
    query_start, context, page_table, tails,
    num_sequences, table_row, q_token, q_head, k_page, k_page_head, v_page, v_page_head,
    k_token, k_head, v_token, v_head, scale, softcap, window, splits,
    BITS: tl.constexpr, LATENT: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr, ONE: tl.constexpr, SKIP: tl.constexpr, PEEL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows, of GROUP heads, against one part of their keys. BLOCKS such groups share a key head.

    Pages hold all of these, or, where they are quantized (BITS < 16), those before a row's own page.
    PEEL: tiles that every row sees are a loop of their own, which has no masks.
    """
    tl.static_assert(not (PEEL and WINDOW))
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    # A sequence's last blocks have the most keys, and start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, first, length, query = locate(query_start, num_sequences, block, BLOCK_Q, ONE, SKIP)
    if length == 0:
        return
    kv_head = tl.program_id(1) // BLOCKS
    total = tl.load(context + sequence)

    row = tl.arange(0, BLOCK_M)
    query_of_row = query + row // GROUP
    head = tl.program_id(1) * GROUP + row % GROUP
    alive = (row < BLOCK_Q * GROUP) & (query_of_row < length)
    token = (first + query_of_row).to(tl.int64)
    q_at = q + (token * q_token + head * q_head)[:, None]

    # Keys that any row of the block sees, in tiles; this program takes its share of them.
    begin = total - length
    start = begin + query
    end = tl.minimum(start + BLOCK_Q, total)
    position = start + row // GROUP
    since, until, seen, in_pages, tile, tiles, own, own_end = _keys_of(
        start, end, total, position, window, BITS, PAGE, BLOCK_N, WINDOW
    )
    if SPLIT:
        # Tiles of pages, and after them those of the rows' own pages.
        part, parts = share_of(tile, tiles + own_end - own, tl.program_id(2), splits)
        own_end = own + tl.maximum(parts - tiles, 0)
        own = own + tl.maximum(part - tiles, 0)
        tile, tiles = tl.minimum(part, tiles), tl.minimum(parts, tiles)

    seen = tl.minimum(tl.maximum(seen // BLOCK_N, tile), tiles)
    table = page_table + sequence.to(tl.int64) * table_row
    kv_at = kv_head.to(tl.int64)
    k_pages += kv_at * k_page_head
    v_pages += kv_at * v_page_head
    if BITS < 16:
        acc, top, weight = attend_codes(
            q_at, alive, since, until, tile, seen, tiles, in_pages, table, k_pages, v_pages,
            k_scales + kv_at * k_page_head, v_scales + kv_at * v_page_head, k_page, v_page,
            scale, softcap, LATENT, BITS, DK, DV, PAGE,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_V, WINDOW, SOFTCAP, PEEL, ASM, CONSTRAINTS,
        )  # fmt: skip
    dk = dims_of(BITS, DK, BLOCK_K)
    dv = dims_of(BITS, DV, BLOCK_V)
    if LATENT:
        common = load_queries(q_at, alive, dv, DV, BLOCK_V)
        rows = load_queries(q_at + DV, alive, dk, DK, BLOCK_K)
    else:
        rows = load_queries(q_at, alive, dk, DK, BLOCK_K)
        common = rows
    if BITS < 16:
        tail = tl.load(tails + sequence).to(tl.int64) * (tl.num_programs(1) // BLOCKS) + kv_head
        acc, top, weight = _attend_exact(
            acc, top, weight, rows, common, tl.maximum(since, until), position + 1, own, own_end,
            first, begin, total, dk, dv, k + kv_at * k_head, v + kv_at * v_head,
            k_tails + tail * PAGE * DK, v_tails + tail * PAGE * DV, k_token, v_token, scale, softcap,
            LATENT, DK, DV, PAGE, BLOCK_N, SOFTCAP,
        )  # fmt: skip
    else:
        acc, top, weight = _attend_pages(
            rows, common, since, until, tile, seen, tiles, in_pages, table, k_pages, v_pages,
            k_page, v_page, scale, softcap, LATENT, DK, DV, PAGE,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_V, WINDOW, SOFTCAP, PEEL,
        )  # fmt: skip

    at = (block * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * splits + tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    _store(
        acc, top, weight, out, partial, stats, sinks, at * BLOCK_M + row,
        (token * heads + head) * DV, head, dv, alive, DV, BLOCK_V, SPLIT, SINKS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_sequences", "splits"])
def merge_kernel(
    out, partial, stats, sinks, query_start, num_sequences, splits,
    GROUP: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr, ONE: tl.constexpr, SKIP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One row: its parts, at most BLOCK_S, weighted by their share of the sum of weights."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    block = tl.program_id(0)
    _, first, length, query = locate(query_start, num_sequences, block, BLOCK_Q, ONE, SKIP)
    heads = tl.program_id(1)
    row = tl.program_id(2)
    if query + row // GROUP >= length:
        return
    head = heads * GROUP + row % GROUP
    part = tl.arange(0, BLOCK_S)
    dv = tl.arange(0, BLOCK_V)
    there = part < splits
    at = ((block * tl.num_programs(1) + heads).to(tl.int64) * splits + part) * BLOCK_M + row
    tops = tl.load(stats + 2 * at, mask=there, other=float("-inf"))
    weights = tl.load(stats + 2 * at + 1, mask=there, other=0.0)
    stored = there[:, None] if DV == BLOCK_V else there[:, None] & (dv < DV)[None, :]
    accs = tl.load(partial + at[:, None] * BLOCK_V + dv[None, :], mask=stored, other=0.0)
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
    to = (token * tl.num_programs(1) * GROUP + head) * DV + dv
    tl.store(out + to, result.to(out.dtype.element_ty), mask=dv < DV)
