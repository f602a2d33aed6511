"""What rows may not draw, and what they should: masks of grammars and biases, on logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace.scheduler.plan import Sampling


def constrained(logits: Tensor, rows: Sequence[Sampling]) -> Tensor:
    """The logits [R, vocabulary] with biases added and -inf where a mask forbids a token.

    The same tensor when there are neither. Tokens without a logit are passed over.
    """
    masked = [i for i, how in enumerate(rows) if how.mask]
    biased = [
        (i, token, bias)
        for i, how in enumerate(rows)
        for token, bias in how.logit_bias
        if token < logits.shape[1]
    ]
    if not (masked or biased):
        return logits
    scores = logits.clone()
    if biased:
        row, token, bias = zip(*biased, strict=True)
        index = _to(torch.tensor([row, token]), logits.device)
        scores[index[0], index[1]] += _to(torch.tensor(bias), logits.device)
    if masked:
        index = _to(torch.tensor(masked), logits.device)
        allowed = _unpack([rows[i].mask for i in masked], logits.device, logits.shape[1])
        scores[index] = scores[index].masked_fill_(~allowed, -torch.inf)
    return scores


def _unpack(masks: Sequence[bytes], device: torch.device, width: int) -> Tensor:
    """One bit a token to bool [masks, width]; what is behind a mask's end is not allowed."""
    longest = -(-width // 8)
    packed = bytearray().join(mask[:longest].ljust(longest, b"\0") for mask in masks)
    bits = _to(torch.frombuffer(packed, dtype=torch.uint8), device).view(len(masks), longest, 1)
    weights = _to(torch.tensor([1 << i for i in range(8)], dtype=torch.uint8), device)
    return (bits & weights).ne(0).flatten(1)[:, :width]


def _to(host: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
