"""AWQ: input channels that matter are made larger before they are rounded, and their inputs smaller.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2023): of the
scales s = (mean |x|)^alpha, those are taken that change the output least, W x against Q(W s) (x / s). The
output's error is computed from the inputs' second moments H: the sum over rows of d' H d, where d is a row of
Q(W s) / s - W. Scales make up for nothing once the matrix is stored: x / s is made by what makes x.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 20
"""Values of alpha between 0 and 1 that are tried; 0 leaves everything as it is."""

Rounding = Callable[[Tensor], Tensor]
"""A matrix [N, K] to the values that it is stored as."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Scales of input channels [K] float32; errors are of the outputs, squared and summed."""

    scales: Tensor
    alpha: float
    error: float
    error_without: float


def search_scales(
    matrices: Sequence[tuple[Tensor, Rounding]],
    gram: Tensor,
    magnitude: Tensor,
    sharing: Callable[[Tensor], Tensor] = lambda scales: scales,
) -> Scaling:
    """The scales that the matrices [N, K], which get the same input, lose least with, each by its rounding.

    `gram` [K, K] is the mean of x x', `magnitude` [K] that of |x|. `sharing` makes channels' scales equal
    where what is before them can make no difference.
    """
    ones = torch.ones_like(magnitude)
    best, alpha = ones, 0.0
    least = without = _error(matrices, gram, ones)
    for step in range(1, STEPS + 1):
        scales = sharing(channel_scales(magnitude, step / STEPS))
        error = _error(matrices, gram, scales)
        if error < least:
            best, alpha, least = scales, step / STEPS, error
    return Scaling(best, alpha, least, without)


def _error(matrices: Sequence[tuple[Tensor, Rounding]], gram: Tensor, scales: Tensor) -> float:
    return sum(output_error(w, rounding(w * scales) / scales, gram) for w, rounding in matrices)


def channel_scales(magnitude: Tensor, alpha: float) -> Tensor:
    """magnitude^alpha, over the geometric mean of its greatest and least. Channels that were never
    other than zero count as the least of the others."""
    seen = magnitude > 0
    if not bool(seen.any()):
        return torch.ones_like(magnitude)
    least = magnitude[seen].amin()
    powers = magnitude.clamp(min=least.clamp(min=magnitude.amax() * 1e-4)) ** alpha
    return powers / (powers.amax() * powers.amin()).sqrt()


def output_error(weight: Tensor, values: Tensor, gram: Tensor) -> float:
    """The mean squared error of the outputs, summed over them, when `values` stand for `weight` [N, K]."""
    difference = values - weight
    return float((difference @ gram).mul_(difference).sum())


def output_size(weight: Tensor, gram: Tensor) -> float:
    """The mean square of the outputs of `weight` [N, K], summed over them."""
    return float((weight @ gram).mul_(weight).sum())
