"""When two tokens count as equally likely: a ring and a sweep round differently."""

from headrace.cluster.serving.shadow.messages import Setup

TIES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
"""Nats by which roundings of the compute type may change which of two tokens is the likelier one."""

KV_TIES = {"int8": 0.1, "int4": 0.5}
"""The same where the ring has read rounded keys and values, which the sweep has not."""


def tie_of(setup: Setup, kv_format: str) -> float:
    """In nats, for a ring with KV pages in that format."""
    return max(setup.tie, KV_TIES.get(kv_format, 0.0))
