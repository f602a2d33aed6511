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


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """q [G, n, heads, Dk], k [G, kv_heads, L, Dk], v [G, kv_heads, L, Dv] to [G, n, heads, Dv].

    `mask` is a group_mask. The queries of a group of heads become rows of one matrix, so that each key is read once.
    """
    count, rows, heads, _ = q.shape
    group = heads // k.shape[1]
    packed = q.reshape(count, rows, k.shape[1], group, -1)
    packed = packed.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [G, kv_heads, group * n, Dk]
    if rule.softcap is None and rule.sinks is None:
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=rule.scaling)
    else:
        out = _explicit_attention(packed, k, v, mask, rule)
    out = out.view(count, -1, group, rows, v.shape[-1])
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """Scores in float32, for what scaled_dot_product_attention has no argument for."""
    if q.shape[2] == 1:  # a product of one row would sum in another order
        return _explicit_attention(q.expand(-1, -1, 2, -1), k, v, mask, rule)[:, :, :1]
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
