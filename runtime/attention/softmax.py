"""Softmax attention of few queries over gathered keys and values, in torch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rule:
    """How scores become weights: softmax over tanh(s * scaling / softcap) * softcap, and sinks.

    `sinks` [query_heads] are extra logits that take weight and give no value (gpt-oss).
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """q [n, heads, Dk], k [1, kv_heads, L, Dk], v [1, kv_heads, L, Dv] to [n, heads, Dv].

    The queries of a group of heads become rows of one matrix, so that each key is read once.
    """
    rows, heads, _ = q.shape
    kv_heads = k.shape[1]
    packed = q.reshape(rows, kv_heads, heads // kv_heads, -1).permute(1, 2, 0, 3)
    out = softmax_attention(packed.flatten(1, 2)[None], k, v, mask, rule)
    return out.view(heads, rows, -1).transpose(0, 1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """q [G, kv_heads, n, Dk], k [G, kv_heads, L, Dk], v [G, kv_heads, L, Dv] to
    [G, kv_heads, n, Dv]. `mask` is a group_mask."""
    if rule.softcap is None and rule.sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scaling)
    return _explicit_attention(q, k, v, mask, rule)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """Scores in float32, for what scaled_dot_product_attention has no argument for."""
    if q.shape[2] == 1:  # a product of one row would sum in another order
        return _explicit_attention(q.expand(-1, -1, 2, -1), k, v, mask, rule)[:, :, :1]
    scores = (q.float() @ k.float().mT) * rule.scaling
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores + mask
    if rule.sinks is not None:
        kv_heads = k.shape[1]
        sinks = rule.sinks.float().view(kv_heads, -1)
        sinks = sinks.repeat_interleave(q.shape[2] // sinks.shape[1], dim=1)  # [kv_heads, rows]
        column = sinks[None, :, :, None].expand(len(q), -1, -1, -1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
    return (weights @ v.float()).to(q.dtype)
