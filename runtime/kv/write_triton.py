"""Writes keys and values to pages and tails on CUDA. Runs on CPUs with TRITON_INTERPRET=1."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from headrace.runtime.attention.blocks import find_sequence
from headrace.runtime.attention.loads import load_exact
from headrace.runtime.attention.tiles import power_of_two
from headrace.runtime.batch import Batch
from headrace.runtime.kv.store import LayerKV, QuantizedKV
from headrace.scheduler.plan import PAGE_TOKENS


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
    k, v = rows(k), rows(v)
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


@triton.jit(do_not_specialize=["num_sequences", "table_row"])
def _fill_kernel(
    x, codes, scales, tails, query_start, context, page_table, slots, num_sequences, table_row,
    x_token, x_head, page_stride, head_stride,
    BITS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One page and head: quantize it, if the batch fills it. Halves of keys are BLOCK wide."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence = find_sequence(query_start, num_sequences, block, PAGE)
    first = tl.load(query_start + sequence)
    total = tl.load(context + sequence)
    begin = total - (tl.load(query_start + sequence + 1) - first)
    number = begin // PAGE + block - first // PAGE - sequence
    if (number + 1) * PAGE > total:
        return
    key = number * PAGE + tl.arange(0, PAGE)
    slot = tl.load(slots + sequence).to(tl.int64) * tl.num_programs(1) + head
    tail = tails + slot * PAGE * DIM
    HALF: tl.constexpr = DIM // 2
    dim = tl.arange(0, BLOCK)
    there = (dim < HALF)[None, :]
    # Numbers from HALF on of the first half are not of it, and are not looked at.
    one = load_exact(x + head * x_head, x_token, tail, first, begin, total, key, dim, DIM, PAGE)
    two = load_exact(
        x + head * x_head, x_token, tail, first, begin, total, key, HALF + dim, DIM, PAGE
    )
    one = one.to(tl.float32)
    two = two.to(tl.float32)

    page = tl.load(page_table + sequence.to(tl.int64) * table_row + number).to(tl.int64)
    WIDTH: tl.constexpr = HALF if BITS == 4 else DIM
    at = tl.arange(0, PAGE)
    to = codes + page * page_stride + head * head_stride + (at * WIDTH)[:, None] + dim[None, :]
    scale_to = scales + page * (page_stride // 2) + head * (head_stride // 2) + at
    if BITS == 8:
        large = tl.maximum(tl.abs(one), tl.abs(two))
        step = (tl.max(tl.where(there, large, 0.0), 1) / 127).to(tl.float16)
        tl.store(to, _nearest(one, step, -127, 127).to(tl.int8), mask=there)
        tl.store(to + HALF, _nearest(two, step, -127, 127).to(tl.int8), mask=there)
    else:
        least = tl.min(tl.where(there, tl.minimum(one, two), float("inf")), 1).to(tl.float16)
        tl.store(scale_to + PAGE, least)
        one -= least.to(tl.float32)[:, None]
        two -= least.to(tl.float32)[:, None]
        step = (tl.max(tl.where(there, tl.maximum(one, two), 0.0), 1) / 15).to(tl.float16)
        low = _nearest(one, step, 0, 15).to(tl.uint8)
        high = _nearest(two, step, 0, 15).to(tl.uint8)
        tl.store(to, low | (high << 4), mask=there)
    tl.store(scale_to, step)


@triton.jit
def _nearest(x, step, least: tl.constexpr, most: tl.constexpr):
    """Multiples of `step`; of a step that is too small for float16, none."""
    step = step.to(tl.float32)
    code = tl.floor(x / tl.where(step == 0, 1.0, step)[:, None] + 0.5)
    return tl.minimum(tl.maximum(code, least), most)


@triton.jit
def _keep_kernel(
    x, tails, query_start, context, slots, x_token, x_head,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One sequence and head: what the batch has of its newest page goes to its tail."""
    sequence = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    first = tl.load(query_start + sequence)
    total = tl.load(context + sequence)
    begin = total - (tl.load(query_start + sequence + 1) - first)
    at = tl.arange(0, PAGE)
    dim = tl.arange(0, BLOCK)
    key = total // PAGE * PAGE + at
    mask = ((key >= begin) & (key < total))[:, None] & (dim < DIM)[None, :]
    row = (first + key - begin).to(tl.int64) * x_token
    new = tl.load(x + head * x_head + row[:, None] + dim[None, :], mask=mask)
    slot = tl.load(slots + sequence).to(tl.int64) * tl.num_programs(1) + head
    to = tails + slot * PAGE * DIM + (at * DIM)[:, None] + dim[None, :]
    tl.store(to, new, mask=mask)


def fill(k: Tensor, v: Tensor, kv: QuantizedKV, batch: Batch) -> None:
    """Quantize the pages that k [T, heads, k_dim] and v fill, with what the tails hold of them.

    Before attention, which reads these pages.
    """
    sequences = len(batch.lengths)
    for x, side in ((k, kv.k), (v, kv.v)):
        codes, dim = side.codes, x.shape[-1]
        # A slice of n tokens fills at most n / 64 pages, rounded up, and has a block more.
        _fill_kernel[(len(x) // PAGE_TOKENS + sequences, x.shape[1])](
            x, codes, side.scales, side.tails,
            batch.query_start, batch.context, batch.page_table, batch.tails,
            sequences, batch.page_table.stride(0),
            x.stride(0), x.stride(1), codes.stride(0), codes.stride(1),
            BITS=side.fmt.bits, DIM=dim, BLOCK=power_of_two(dim // 2), PAGE=PAGE_TOKENS,
        )  # fmt: skip


def keep(k: Tensor, v: Tensor, kv: QuantizedKV, batch: Batch) -> None:
    """Put what k and v have of sequences' newest pages into the tails. After attention and `fill`,
    which read there what was before."""
    for x, side in ((k, kv.k), (v, kv.v)):
        dim = x.shape[-1]
        _keep_kernel[(len(batch.lengths), x.shape[1])](
            x, side.tails, batch.query_start, batch.context, batch.tails, x.stride(0), x.stride(1),
            DIM=dim, BLOCK=power_of_two(dim), PAGE=PAGE_TOKENS,
        )  # fmt: skip


def rows(x: Tensor) -> Tensor:
    """x with its last dimension contiguous, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()
