"""What weight each key has: the online softmax of the attention kernels. Scores are in base 2.

Runs on CPUs with TRITON_INTERPRET=1.
"""

# Kernels are Triton's dialect: their arguments are pointers and scalars of a launch.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _bend(score, softcap):
    """softcap * tanh(score / softcap), in base 2."""
    decay = tl.exp2(-2.0 * 1.4426950408889634 * tl.abs(score) / softcap)
    bent = softcap * 1.4426950408889634 * (1.0 - decay) / (1.0 + decay)
    return tl.where(score < 0, -bent, bent)


@triton.jit
def shares(
    score, top, weight, key, since, until, scale, softcap,
    SINCE: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile's weights, what earlier ones are still worth, and the new (max, sum of weights).

    A row sees the keys before its `until`, with SINCE from its `since` on; unless MASKED, all of them.
    """
    unit = scale
    if SOFTCAP:
        score = _bend(score * scale, softcap)
        unit = 1.0
    if MASKED:
        visible = key[None, :] < until[:, None]
        if SINCE:
            visible = visible & (key[None, :] >= since[:, None])
        score = tl.where(visible, score, float("-inf"))

    new_top = tl.maximum(top, tl.max(score, 1) * unit)
    base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    share = tl.exp2(score * unit - base[:, None])
    keep = tl.exp2(top - base)
    return share, keep, new_top, weight * keep + tl.sum(share, 1)
