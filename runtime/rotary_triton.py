"""The rotary embedding of queries and keys as one kernel on CUDA; see rotary.

A program takes one token and some heads of either. Computes in float32 and rounds once. Runs on CPUs
with TRITON_INTERPRET=1.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.runtime.rotary import Form

_PAIRS = 512
"""Pairs of a program: a few for each thread, and several programs where there is one token."""


@triton.jit
def _rotate_heads(
    x, out, x_head, x_dim, first, heads, cos_a, cos_b, sin_a, sin_b,
    DIM: tl.constexpr, PAIRS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr, SOURCE_STEP: tl.constexpr, SOURCE_GAP: tl.constexpr,
    TARGET_STEP: tl.constexpr, TARGET_GAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one token, from `first` on."""
    head = first + tl.arange(0, BLOCK_H)[:, None]
    pair = tl.arange(0, BLOCK_P)[None, :]
    mask = (head < heads) & (pair < PAIRS)
    a_from = x + head * x_head + pair * SOURCE_STEP * x_dim
    a_to = out + head * DIM + pair * TARGET_STEP
    a = tl.load(a_from, mask=mask).to(tl.float32)
    b = tl.load(a_from + SOURCE_GAP * x_dim, mask=mask).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(a_to, (a * cos_a - b * sin_a).to(kind), mask=mask)
    tl.store(a_to + TARGET_GAP, (b * cos_b + a * sin_b).to(kind), mask=mask)
    if 2 * PAIRS < DIM:
        rest = 2 * PAIRS + tl.arange(0, BLOCK_REST)[None, :]
        mask = (head < heads) & (rest < DIM)
        passed = tl.load(x + head * x_head + rest * x_dim, mask=mask)
        tl.store(out + head * DIM + rest, passed, mask=mask)


@triton.jit
def rotate_kernel(
    q, k, cos, sin, q_out, k_out, q_heads, k_heads,
    q_token, q_head, q_dim, k_token, k_head, k_dim, cos_token, cos_dim, sin_token, sin_dim,
    DIM: tl.constexpr, PAIRS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr, SOURCE_STEP: tl.constexpr, SOURCE_GAP: tl.constexpr,
    TABLE_STEP: tl.constexpr, TABLE_GAP: tl.constexpr,
    TARGET_STEP: tl.constexpr, TARGET_GAP: tl.constexpr,
):  # fmt: skip
    """One token, BLOCK_H heads: of q in the first blocks, of k in the others.

    Pair p is what lies at p * STEP and GAP further, of the source, the table and the target.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    pair = tl.arange(0, BLOCK_P)[None, :]
    mask = pair < PAIRS
    cos_at = cos + token * cos_token + pair * TABLE_STEP * cos_dim
    sin_at = sin + token * sin_token + pair * TABLE_STEP * sin_dim
    cos_a = tl.load(cos_at, mask=mask).to(tl.float32)
    cos_b = tl.load(cos_at + TABLE_GAP * cos_dim, mask=mask).to(tl.float32)
    sin_a = tl.load(sin_at, mask=mask).to(tl.float32)
    sin_b = tl.load(sin_at + TABLE_GAP * sin_dim, mask=mask).to(tl.float32)
    q_blocks = tl.cdiv(q_heads, BLOCK_H)
    if block < q_blocks:
        _rotate_heads(
            q + token * q_token, q_out + token * q_heads * DIM, q_head, q_dim,
            block * BLOCK_H, q_heads, cos_a, cos_b, sin_a, sin_b,
            DIM, PAIRS, BLOCK_H, BLOCK_P, BLOCK_REST,
            SOURCE_STEP, SOURCE_GAP, TARGET_STEP, TARGET_GAP,
        )  # fmt: skip
    else:
        _rotate_heads(
            k + token * k_token, k_out + token * k_heads * DIM, k_head, k_dim,
            (block - q_blocks) * BLOCK_H, k_heads, cos_a, cos_b, sin_a, sin_b,
            DIM, PAIRS, BLOCK_H, BLOCK_P, BLOCK_REST,
            SOURCE_STEP, SOURCE_GAP, TARGET_STEP, TARGET_GAP,
        )  # fmt: skip


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """q [1, heads, T, D], k [1, kv_heads, T, D], cos and sin [1, T, W], any strides.

    Returns views of new tensors [1, T, heads, D] and [1, T, kv_heads, D], transposed like q and k.
    """
    _, q_heads, tokens, dim = q.shape
    k_heads = k.shape[1]
    q_out, k_out = _like_rows(q), _like_rows(k)
    block_p = triton.next_power_of_2(form.pairs)
    block_h = min(max(1, _PAIRS // block_p), triton.next_power_of_2(q_heads))
    source, table, target = (pairs.step_and_gap(form.pairs) for pairs in form.layouts)
    blocks = triton.cdiv(q_heads, block_h) + triton.cdiv(k_heads, block_h)
    rotate_kernel[(tokens, blocks)](
        q, k, cos, sin, q_out, k_out, q_heads, k_heads,
        q.stride(2), q.stride(1), q.stride(3), k.stride(2), k.stride(1), k.stride(3),
        cos.stride(1), cos.stride(2), sin.stride(1), sin.stride(2),
        DIM=dim, PAIRS=form.pairs, BLOCK_H=block_h, BLOCK_P=block_p,
        BLOCK_REST=triton.next_power_of_2(max(1, dim - 2 * form.pairs)),
        SOURCE_STEP=source[0], SOURCE_GAP=source[1], TABLE_STEP=table[0], TABLE_GAP=table[1],
        TARGET_STEP=target[0], TARGET_GAP=target[1], num_warps=4,
    )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def _like_rows(x: Tensor) -> Tensor:
    """Room for x [1, heads, T, D], laid out [1, T, heads, D] as attention reads it."""
    return torch.empty(1, x.shape[2], x.shape[1], x.shape[3], dtype=x.dtype, device=x.device)
