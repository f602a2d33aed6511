"""GPTQ: rounding a matrix column by column, each column's error made up for by those not yet rounded.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(2022), algorithm 1: with the inputs' second moments H and U the upper Cholesky factor of H^-1, column j,
once rounded, leaves an error (w_j - q_j) / U_jj, of which U_ji is taken from every later column i.
Columns go in descending order of H_jj ("act-order"), with scales that were settled before, so that codes
lie in the matrix's own order and nothing has to be reordered when it runs ("static groups").
"""

import logging

import torch
from torch import Tensor

from headrace.runtime.calibration.grids import Grid

log = logging.getLogger(__name__)

DAMPING = 0.01
"""Added to H's diagonal, as a share of its mean."""

BLOCK = 128
"""Columns after which the later ones learn of errors."""

_MOST_DAMPING = 10.0


def gptq(
    weight: Tensor, gram: Tensor, grid: Grid, *, damping: float = DAMPING, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Codes and values [N, K] of `weight` [N, K] float32, in `grid`'s scales.

    `gram` [K, K] float32 is the mean of x x' over inputs x [K], or any multiple of it. A column
    whose input was never other than zero is rounded to nearest: what it will be given is not known.
    """
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    factor = inverse_factor(gram[order][:, order], damping)
    left = weight[:, order]
    codes, values = torch.empty_like(weight), torch.empty_like(weight)
    columns = order.tolist()
    for first in range(0, len(columns), block):
        last = min(first + block, len(columns))
        some, u = left[:, first:last], factor[first:last, first:last]
        errors = torch.empty_like(some)
        for i in range(last - first):
            column = columns[first + i]
            codes[:, column], value = grid.nearest(column, some[:, i])
            values[:, column] = value
            error = (some[:, i] - value) / u[i, i]
            some[:, i + 1 :] -= error[:, None] * u[i, i + 1 :]
            errors[:, i] = error
        left[:, last:] -= errors @ factor[first:last, last:]
    return codes, values


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """U, upper triangular [K, K] float32, with U' U = (gram + damping)^-1. `gram` is written over.

    With rows and columns backwards, a lower Cholesky factor of gram is an upper one, R R' = gram, and
    U = R^-1. Where float32 does not do, ten times the damping is tried. Raises ValueError if no damping
    helps: `gram` then holds what is no number.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    mean, added = diagonal.mean(), 0.0
    while damping <= _MOST_DAMPING:
        diagonal += (damping - added) * mean
        lower, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
        if not failed and bool(torch.isfinite(lower.diagonal()).all()):
            identity = torch.eye(len(gram), device=gram.device)
            factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            return factor
        log.info("second moments of inputs are not positive definite with damping %g", damping)
        damping, added = max(damping, DAMPING / 10) * 10, damping
    raise ValueError("the second moments of a matrix's inputs hold no finite numbers")
