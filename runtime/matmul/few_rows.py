"""Products of few rows with 4-bit weights on CUDA, without dequantizing the weights to memory."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from headrace.runtime.matmul.configs import Codes, Config
from headrace.runtime.matmul.tuning import choices
from headrace.runtime.trace import Kind, Tracer


class FourBit(Protocol):
    """A weight [N, K] in bitsandbytes' 4-bit layout."""

    @property
    def kind(self) -> str: ...

    @property
    def group(self) -> int: ...

    @property
    def shape(self) -> torch.Size: ...

    def codes(self) -> Codes: ...


def multiply(
    x: Tensor, weights: Sequence[FourBit], biases: Sequence[Tensor | None], tracer: Tracer
) -> tuple[Tensor, ...] | None:
    """x [..., K] times each weight [N, K], plus its bias [N]; None where dequantizing is faster.

    Several weights are one launch of our kernel, or None.
    """
    if not x.is_cuda or x.dtype == torch.float32:
        return None
    kinds = {(weight.kind, weight.group, weight.shape[1:]) for weight in weights}
    if len(kinds) > 1 or len({bias is None for bias in biases}) > 1:
        return None
    kind, group, rest = kinds.pop()
    # Several weights take as long as one with the columns of all.
    shape = (sum(weight.shape[0] for weight in weights), *rest)
    choice = choices(x.device).choose(kind, group, shape, x.shape[:-1].numel(), x.dtype)
    if choice.config is not None:
        return _ours(x, weights, biases, choice.config, tracer)
    if choice.path == "dense" or len(weights) > 1:
        return None
    # Never on CPUs, where the vector kernel wants another layout and is silently wrong.
    with tracer.span(Kind.MATMUL, "fused"):
        codes = weights[0].codes()
        packed = codes.packed.view(-1, 1)
        out: Tensor = torch.ops.bitsandbytes.gemm_4bit(
            x, packed, codes.shape, codes.scales, group, kind, biases[0]
        )
        return (out,)


def _ours(
    x: Tensor,
    weights: Sequence[FourBit],
    biases: Sequence[Tensor | None],
    config: Config,
    tracer: Tracer,
) -> tuple[Tensor, ...]:
    from headrace.runtime.matmul.kernel import matmuls  # Triton, where there is CUDA

    given = [bias for bias in biases if bias is not None]
    with tracer.span(Kind.MATMUL, "few rows"):
        return matmuls(x, [weight.codes() for weight in weights], given or None, config)
