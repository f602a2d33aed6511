"""The attention kernels' loop over quantized pages.

Codes are multiplied as they are, as small integers, which are exact in every type: steps and lowest
numbers are a key's, so they are taken into its score and its weight, not into each of its numbers.

    q . (step * code + lowest)      =  step * (q . code) + lowest * sum of q
    w * (step * code + lowest)      =  (w * step) * code + w * lowest

Codes are read as words of 16 bits, which tensor cores' operands are made of: bytes would have to be
transposed one at a time. A word's 2 or 4 codes are numbers of a key that are apart, each of which is
multiplied with queries' numbers of the same place: a part. Sums of values are kept by parts, too.

Runs on CPUs with TRITON_INTERPRET=1.
"""

# Kernels are Triton's dialect: their arguments are pointers and scalars of a launch.
# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from headrace.runtime.attention.loads import load_queries, pages_of
from headrace.runtime.attention.shares import shares


@triton.jit
def dims_of(BITS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Which number of a key each column of a block is; those that are none are DIM or more.

    Of 4 bits, both halves of a key are in the same bytes, and each fills its half of the columns.
    """
    column = tl.arange(0, BLOCK)
    if BITS == 4 and DIM < BLOCK:
        within = column % (BLOCK // 2)
        column = tl.where(within < DIM // 2, column // (BLOCK // 2) * (DIM // 2) + within, BLOCK)
    return column


@triton.jit
def load_parts(at, alive, BITS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Queries [rows, numbers], by parts [rows, words]."""
    word = tl.arange(0, BLOCK * BITS // 16)
    parts = ()
    for part in tl.static_range(16 // BITS):
        own = part if BITS == 8 else part % 2 * (DIM // 2) + part // 2
        dim = 2 * word + own
        there = word < DIM * BITS // 16
        parts = parts + (load_queries(at, alive, tl.where(there, dim, DIM), DIM, BLOCK),)
    return parts


@triton.jit
def _join(parts, BITS: tl.constexpr):
    """Sums of values, by parts [rows, words], as columns that are numbers `dims_of`."""
    if BITS == 8:
        both = tl.join(parts[0], parts[1])
    else:
        low = tl.join(parts[0], parts[2])
        high = tl.join(parts[1], parts[3])
        both = tl.permute(tl.join(low, high), [0, 3, 1, 2])
    return tl.reshape(both, [parts[0].shape[0], parts[0].shape[1] * (16 // BITS)])


@triton.jit
def _numbers(
    words, queries, BITS: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr
):  # fmt: skip
    """Codes of words, by parts, in the type of the queries; by PTX, if there is any."""
    if ASM != "" and BITS == 8:
        parts = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [words], (queries.dtype,) * 2, is_pure=True, pack=2
        )
    elif ASM != "":
        parts = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [words], (queries.dtype,) * 4, is_pure=True, pack=2
        )
    elif BITS == 8:
        parts = (((words << 8) >> 8).to(queries.dtype), (words >> 8).to(queries.dtype))
    else:
        parts = (
            (words & 15).to(queries.dtype),
            ((words >> 4) & 15).to(queries.dtype),
            ((words >> 8) & 15).to(queries.dtype),
            ((words >> 12) & 15).to(queries.dtype),
        )
    return parts


@triton.jit
def _load_words(
    pages, page, page_stride, tile, WORDS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Codes [BLOCK_N, BLOCK] of one head; `pages` points at the head's part of page 0.

    Those of keys that are not there are of some key of the last page.
    """
    n = tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK)
    if BLOCK_N > PAGE:
        at = (pages + page * page_stride + n % PAGE * WORDS)[:, None] + word[None, :]
    else:
        first = pages + page * page_stride + tile * BLOCK_N % PAGE * WORDS
        at = first + n[:, None] * WORDS + word[None, :]
    if WORDS < BLOCK:
        return tl.load(at, mask=(word < WORDS)[None, :], other=0)
    return tl.load(at)


@triton.jit
def _load_scales(
    scales, page, page_stride, tile, total, BITS: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Keys' steps and lowest numbers; zeros where there are no keys, whose scales may be nan.

    Pages are full, so that smaller tiles than these are.
    """
    n = tl.arange(0, BLOCK_N)
    at = scales + page * page_stride + (tile * BLOCK_N + n) % PAGE
    if BLOCK_N > PAGE:
        fresh = tile * BLOCK_N + n < total
        step = tl.load(at, mask=fresh, other=0.0).to(tl.float32)
        lowest = tl.load(at + PAGE, mask=fresh, other=0.0).to(tl.float32) if BITS == 4 else step
    else:
        step = tl.load(at).to(tl.float32)
        lowest = tl.load(at + PAGE).to(tl.float32) if BITS == 4 else step
    return step, lowest


@triton.jit
def _products(
    parts, sums, words, step, lowest, BITS: tl.constexpr, ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Of queries, by parts, and keys: [rows, BLOCK_N]."""
    numbers = _numbers(tl.trans(words), parts[0], BITS, ASM, CONSTRAINTS)
    score = tl.dot(parts[0], numbers[0], input_precision="ieee")
    for part in tl.static_range(1, 16 // BITS):
        score = tl.dot(parts[part], numbers[part], score, input_precision="ieee")
    score *= step[None, :]
    if BITS == 4:
        score += sums[:, None] * lowest[None, :]
    return score


@triton.jit
def _sum_of(parts):
    total = tl.sum(parts[0].to(tl.float32), 1)
    for part in tl.static_range(1, len(parts)):
        total += tl.sum(parts[part].to(tl.float32), 1)
    return total


@triton.jit
def _attend_tiles(
    accs, low, top, weight, parts, sums, common, common_sums, since, until, tile, tiles, total, table,
    k_pages, v_pages, k_scales, v_scales, k_page, v_page, scale, softcap,
    LATENT: tl.constexpr, BITS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    SINCE: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, LIFT: tl.constexpr,
    BLOCK_M: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Add tiles [tile, tiles) of pages, which hold `total` keys, to (sums of weighted codes, sum of
    weighted lowest numbers, max, sum of weights).

    LATENT: values are parts of keys too, which `common` of the queries are multiplied with.
    """
    last = tl.maximum(total - 1, 0) // PAGE
    page = pages_of(table, tile, last, BLOCK_N, PAGE)
    for i in range(tile, tiles):
        next_page = pages_of(table, i + 1, last, BLOCK_N, PAGE)  # ahead: see kernels.py
        key = i * BLOCK_N + tl.arange(0, BLOCK_N)
        words = _load_words(
            k_pages, page, k_page, i, DK * BITS // 16, BLOCK_K * BITS // 16, BLOCK_N, PAGE
        )
        step, lowest = _load_scales(k_scales, page, k_page, i, total, BITS, BLOCK_N, PAGE)
        v_words = _load_words(
            v_pages, page, v_page, i, DV * BITS // 16, BLOCK_V * BITS // 16, BLOCK_N, PAGE
        )
        v_step, v_lowest = _load_scales(v_scales, page, v_page, i, total, BITS, BLOCK_N, PAGE)
        score = _products(parts, sums, words, step, lowest, BITS, ASM, CONSTRAINTS)
        if LATENT:
            score += _products(
                common, common_sums, v_words, v_step, v_lowest, BITS, ASM, CONSTRAINTS
            )
        share, keep, top, weight = shares(
            score, top, weight, key, since, until, scale, softcap, SINCE, SOFTCAP, MASKED
        )
        if BITS == 4:
            # For Triton, which loads ahead what products need, and nothing else.
            v_step += 0.0 * v_lowest
        coded = (share * (v_step * LIFT)[None, :]).to(parts[0].dtype)
        numbers = _numbers(v_words, parts[0], BITS, ASM, CONSTRAINTS)
        new = ()
        for part in tl.static_range(16 // BITS):
            acc = accs[part] * keep[:, None]
            new = new + (tl.dot(coded, numbers[part], acc, input_precision="ieee"),)
        accs = new
        if BITS == 4:
            lowest = share * v_lowest[None, :]
            low = low * keep[:, None] + lowest if BLOCK_M < 64 else low * keep + tl.sum(lowest, 1)
        page = next_page
    return accs, low, top, weight


@triton.jit
def attend_codes(
    q_at, alive, since, until, tile, seen, tiles, total, table,
    k_pages, v_pages, k_scales, v_scales, k_page, v_page, scale, softcap,
    LATENT: tl.constexpr, BITS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, SINCE: tl.constexpr, SOFTCAP: tl.constexpr, PEEL: tl.constexpr,
    ASM: tl.constexpr, CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """Rows of queries `q_at` against tiles [tile, tiles) of pages: (sum of weighted values, max, sum of
    weights). PEEL: those before `seen`, which every row sees, are a loop of their own without masks.
    """
    # Steps may be small. In float16, which has no numbers below 6e-8, weights times them are lifted;
    # the largest stays below 2^16, for a step is at most 2^16 / 127, or 2^17 / 15.
    LIFT: tl.constexpr = (
        (64.0 if BITS == 8 else 4.0) if q_at.dtype.element_ty == tl.float16 else 1.0
    )
    if LATENT:
        common = load_parts(q_at, alive, BITS, DV, BLOCK_V)
        parts = load_parts(q_at + DV, alive, BITS, DK, BLOCK_K)
    else:
        parts = load_parts(q_at, alive, BITS, DK, BLOCK_K)
        common = parts
    sums = _sum_of(parts) if BITS == 4 else since
    common_sums = _sum_of(common) if BITS == 4 and LATENT else sums
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    # Warps share few rows, and would wait for each other's sums in every tile.
    low = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) if BLOCK_M < 64 else weight
    accs = ()
    for _ in tl.static_range(16 // BITS):
        accs = accs + (tl.zeros([BLOCK_M, BLOCK_V * BITS // 16], tl.float32),)
    if PEEL:
        accs, low, top, weight = _attend_tiles(
            accs, low, top, weight, parts, sums, common, common_sums, since, until,
            tile, seen, total, table,
            k_pages, v_pages, k_scales, v_scales, k_page, v_page, scale, softcap,
            LATENT, BITS, DK, DV, PAGE, BLOCK_N, BLOCK_K, BLOCK_V, SINCE, SOFTCAP, False, LIFT,
            BLOCK_M, ASM, CONSTRAINTS,
        )  # fmt: skip
        tile = seen
    accs, low, top, weight = _attend_tiles(
        accs, low, top, weight, parts, sums, common, common_sums, since, until,
        tile, tiles, total, table,
        k_pages, v_pages, k_scales, v_scales, k_page, v_page, scale, softcap,
        LATENT, BITS, DK, DV, PAGE, BLOCK_N, BLOCK_K, BLOCK_V, SINCE, SOFTCAP, True, LIFT,
        BLOCK_M, ASM, CONSTRAINTS,
    )  # fmt: skip
    acc = _join(accs, BITS) * (1.0 / LIFT)
    if BITS == 4:
        acc += (tl.sum(low, 1) if BLOCK_M < 64 else low)[:, None]
    return acc, top, weight
