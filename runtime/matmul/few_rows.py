"""Products of few rows with 4-bit weights on CUDA, without dequantizing the weights to memory."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.runtime.manifest import WeightSpec
from headrace.runtime.matmul.configs import LEAST_GROUP, TABLES, Codes, Config, Packing
from headrace.runtime.matmul.tuning import choices
from headrace.runtime.trace import Kind, Tracer


class Packed(Protocol):
    """A weight [N, K], whose codes there are where it has a packing."""

    @property
    def packing(self) -> Packing | None: ...

    @property
    def shape(self) -> torch.Size: ...

    def codes(self) -> Codes: ...


def packing_of(spec: WeightSpec) -> Packing | None:
    """Of a weight whose columns are in order; None where kernels do not take it."""
    if spec.format in TABLES:
        return Packing(spec.format, spec.blocksize)
    zeros = "zero" in spec.parts
    plain = spec.parts.keys().isdisjoint(("offset", "block_scale"))
    taken = plain and spec.blocksize >= LEAST_GROUP[zeros]
    if spec.format != "int4" or not taken:
        return None
    return Packing("int4", spec.blocksize, zeros, scales_of(spec))


def scales_of(spec: WeightSpec) -> torch.dtype:
    """As kernels are given them: scales of 4-bit floats, which may be quantized themselves, in float32."""
    return TORCH_DTYPES[spec.parts["scale"].dtype] if spec.format == "int4" else torch.float32


def multiply(
    x: Tensor, weights: Sequence[Packed], biases: Sequence[Tensor | None], tracer: Tracer
) -> tuple[Tensor, ...] | None:
    """x [..., K] times each weight [N, K], plus its bias [N]; None where dequantizing is faster.

    Several weights are one launch of our kernel, or None.
    """
    if not x.is_cuda or x.dtype == torch.float32:
        return None
    packing, rest = weights[0].packing, weights[0].shape[1:]
    alike = all(other.packing == packing and other.shape[1:] == rest for other in weights[1:])
    if packing is None or not alike or len({bias is None for bias in biases}) > 1:
        return None
    # Several weights take as long as one with the columns of all.
    shape = (sum(weight.shape[0] for weight in weights), *rest)
    choice = choices(x.device).choose(
        packing.kind, packing.group, shape, x.shape[:-1].numel(), x.dtype
    )
    if choice.config is not None:
        return _ours(x, weights, biases, choice.config, tracer)
    if choice.path == "dense" or len(weights) > 1:
        return None
    # Never on CPUs, where the vector kernel wants another layout and is silently wrong.
    with tracer.span(Kind.MATMUL, "fused"):
        codes = weights[0].codes()
        packed = codes.packed.view(-1, 1)
        out: Tensor = torch.ops.bitsandbytes.gemm_4bit(
            x, packed, codes.shape, codes.scales, packing.group, packing.kind, biases[0]
        )
        return (out,)


def _ours(
    x: Tensor,
    weights: Sequence[Packed],
    biases: Sequence[Tensor | None],
    config: Config,
    tracer: Tracer,
) -> tuple[Tensor, ...]:
    from headrace.runtime.matmul.kernel import matmuls  # Triton, where there is CUDA

    given = [bias for bias in biases if bias is not None]
    with tracer.span(Kind.MATMUL, "few rows"):
        return matmuls(x, [weight.codes() for weight in weights], given or None, config)
