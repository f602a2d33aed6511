"""How many drafts ride a pass for nothing, by the planner's own model of it."""

import math
from collections.abc import Callable
from dataclasses import replace

from headrace.scheduler.config import DraftLimits
from headrace.scheduler.decode import Decode
from headrace.scheduler.inputs import ModelShape
from headrace.scheduler.placement import Prediction
from headrace.scheduler.timing import TURNAROUND

MOST_DRAFTS = 8
"""A slice, where the planner decides: few texts go on longer as guessed."""

FREE = 1.02
"""A pass with drafts may take so many times what it takes without."""

LEAST_GAIN = 0.1
"""Tokens more for each sequence, to be expected of drafts, for which a pass is not made ahead, beside
what waiting for its tokens takes where nobody asked for drafts."""

LEAST_REACH = 0.85
"""Of a layer's experts that are loaded when tokens reach them, the share that the pass's tokens reach
without drafts, whose own experts would have to be loaded besides."""


def draft_limits(
    shape: ModelShape,
    prediction: Prediction,
    decode: Decode,
    token_budget: int,
    *,
    split: bool,
    asked: int | None,
    seconds: Callable[[Decode], float],
) -> DraftLimits:
    """Up to `asked` drafts a slice, whatever they cost; None: a few, while what streams hides their rows.

    `seconds` of a round of passes; `split`: experts are loaded when they are reached.
    """
    if asked is not None:
        return DraftLimits(asked, token_budget, 0, LEAST_GAIN) if asked else DraftLimits()
    if prediction.bound_by not in ("nvme", "pcie"):
        return DraftLimits()
    passes = decode.passes_in_flight
    few, most = -(-decode.sequences // passes), token_budget
    limit, low = FREE * seconds(decode), few
    while low < most:
        tokens = -(-(low + most) // 2)
        if seconds(replace(decode, sequences=tokens * passes)) <= limit:
            low = tokens
        else:
            most = tokens - 1
    if low <= few:
        return DraftLimits()
    gain = LEAST_GAIN + TURNAROUND / prediction.pass_seconds
    return DraftLimits(MOST_DRAFTS, low, _least_tokens(shape) if split else 0, gain)


def _least_tokens(shape: ModelShape) -> int:
    """Tokens that reach LEAST_REACH of every layer's experts."""
    shares = [one.per_token / one.count for one in shape.experts if one is not None]
    return max((_tokens_to_reach(share) for share in shares if share < 1.0), default=0)


def _tokens_to_reach(share: float) -> int:
    return math.ceil(math.log(1.0 - LEAST_REACH) / math.log(1.0 - share))
