"""What sweeping a model takes of a device's memory, and how many tokens a micro-batch may have."""

from collections.abc import Sequence

import torch

from headrace.scheduler.errors import DoesNotFitError
from headrace.scheduler.inputs import ModelShape
from headrace.scheduler.memory import LOGIT_ROWS, Layout, activation_bytes
from headrace.scheduler.plan import PAGE_TOKENS
from headrace.scheduler.sizes import format_size

RING_SLOTS = 2
"""While one layer computes, the next one arrives."""

LOGITS_BYTES = 64 << 20
"""At most so many bytes of logits in float32 are made at a time."""

LOGITS_AT_ONCE = 6
"""Of such pieces, what is alive while they are compared: logits in two types, logarithms, products."""

FEWEST_TOKENS = 64


FREE_SHARE = 0.9
"""Of what a CUDA device has free, where nobody says how much may be taken."""


def device_budget(device: torch.device, given: int | None) -> int | None:
    """Bytes that may be taken of the device; None on a CPU if nobody said."""
    if given is None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * FREE_SHARE)
    return given


def logit_rows(vocabulary: int) -> int:
    """Rows that are turned into logits at a time."""
    return max(1, min(LOGIT_ROWS, LOGITS_BYTES // (4 * vocabulary)))


def pages_of(context: int, tokens: int) -> int:
    """KV pages of one layer for a micro-batch of `tokens` of sequences of `context` tokens."""
    return max(1, tokens // context) * -(-context // PAGE_TOKENS)


def sweep_bytes(shape: ModelShape, context: int, tokens: int, *, has_head: bool = True) -> int:
    """Device memory for micro-batches of `tokens` tokens: two layers, the head if there is one, a layer's pages,
    and what is computed."""
    layout = Layout((), (tuple(range(shape.num_layers)),), RING_SLOTS, tokens, 1, 1)
    ring = RING_SLOTS * max(shape.layer_bytes)
    # Layers of unlike shapes have pages of their own.
    pages = pages_of(context, tokens) * sum(set(shape.layer_kv_bytes))
    scratch = shape.largest_matrix * shape.compute_bytes if shape.needs_scratch else 0
    logits = LOGITS_AT_ONCE * 4 * logit_rows(shape.vocab_size) * shape.vocab_size
    computing = activation_bytes(shape, layout, has_head=False)
    if not has_head:
        return ring + scratch + pages + computing
    return ring + shape.head_bytes + scratch + pages + max(computing, logits)


def fitting_tokens(
    shapes: Sequence[ModelShape],
    context: int,
    device_memory: int | None,
    most: int,
    *,
    has_head: bool = True,
) -> int:
    """Tokens of a micro-batch, `most` halved until models of all these shapes fit at once.

    Raises DoesNotFitError, with the figure that is needed, when no micro-batch is small enough.
    """
    tokens = most

    def needed_for(tokens: int) -> int:
        return sum(sweep_bytes(shape, context, tokens, has_head=has_head) for shape in shapes)

    while device_memory is not None and (needed := needed_for(tokens)) > device_memory:
        if tokens // 2 < FEWEST_TOKENS:
            models = "one model" if len(shapes) == 1 else f"{len(shapes)} models at once"
            raise DoesNotFitError(
                f"a sweep of {models} over sequences of {context} tokens needs {format_size(needed)} "
                f"({needed} bytes) of device memory (two layers each, the heads and a micro-batch of {tokens} "
                f"tokens), --device-memory is {format_size(device_memory)}: give it that, a smaller "
                "--context, or fewer models"
            )
        tokens //= 2
    return tokens
