"""GPTQ: rounding a matrix column by column, each column's error made up for by those not yet rounded.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(2022), algorithm 1: with the inputs' second moments H and U the upper Cholesky factor of H^-1, column j,
once rounded, leaves an error e_j = (w_j - q_j) / U_jj, of which U_ji is taken from every later column i.
Columns go in descending order of H_jj ("act-order"), with scales that were settled before, so that codes
lie in the matrix's own order and nothing has to be reordered when it runs ("static groups").

Here columns lie in ascending order and are rounded from the last to the first: U, with rows and columns
backwards, is then the inverse of the lower Cholesky factor of H, and is made where H was.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.runtime.calibration.grids import Grid

log = logging.getLogger(__name__)

DAMPING = 0.01
"""Added to H's diagonal, as a share of its mean."""

BLOCK = 128
"""Columns after which the earlier ones learn of errors."""

_MOST_DAMPING = 10.0
_ROWS = 256
"""That are reordered at a time."""

_INVERTED = 1024
"""Columns of a triangular matrix that are inverted at a time."""


@dataclass(frozen=True, slots=True)
class Factor:
    """Of second moments H [K, K]: `order` [K], columns by ascending H_jj, and `inverse` [K, K] float32, the
    inverse of the lower Cholesky factor of H + damping, in that order."""

    order: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, gram: Tensor, damping: float = DAMPING) -> "Factor":
        """`gram` [K, K] float32 is the mean of x x' over inputs x [K], or any multiple of it. One more matrix of its
        size is made, which becomes the factor; `gram` stays as it is.

        Where float32 does not do, ten times the damping is tried. Raises ValueError if no damping helps: `gram`
        then holds what is no number.
        """
        order = torch.argsort(gram.diagonal(), stable=True, descending=True).flip(0)
        made = torch.empty_like(gram)
        while damping <= _MOST_DAMPING:
            for rows in range(0, len(gram), _ROWS):
                made[rows : rows + _ROWS] = gram[order[rows : rows + _ROWS]][:, order]
            if _factored(made, damping):
                lower = made.mT
                _invert_lower(lower)
                return cls(order, lower)
            log.info("second moments of inputs are not positive definite with damping %g", damping)
            damping = max(damping, DAMPING / 10) * 10
        raise ValueError("the second moments of a matrix's inputs hold no finite numbers")


def _factored(gram: Tensor, damping: float) -> bool:
    """Whether gram + damping has a lower Cholesky factor; its transpose is then where `gram` was."""
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = mean if mean > 0 else 1.0
    diagonal += damping * diagonal.mean()
    # Symmetric, so that its transpose, which lies as LAPACK wants it, is the same.
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(gram.mT, out=(gram.mT, info))
    return not info and bool(torch.isfinite(diagonal).all())


def _invert_lower(lower: Tensor) -> None:
    """Inverts a lower triangular matrix [K, K] where it lies, from its last columns on (LAPACK's trtri)."""
    for first in reversed(range(0, len(lower), _INVERTED)):
        last = min(first + _INVERTED, len(lower))
        corner = lower[first:last, first:last]
        inverse = torch.linalg.solve_triangular(
            corner, torch.eye(last - first, device=lower.device), upper=False
        )
        if last < len(lower):
            below = lower[last:, first:last] @ inverse
            lower[last:, first:last] = (lower[last:, last:] @ below).neg_()
        corner.copy_(inverse)


def gptq(
    weight: Tensor, factor: Factor, grid: Grid, *, block: int = BLOCK
) -> tuple[Tensor, float | None]:
    """Codes [N, K] of `weight` [N, K] float32, in `grid`'s scales, as small whole numbers; and the outputs' squared
    error over their square by the inputs that `factor` is of, the damping counted in.

    A column whose input was never other than zero is rounded to nearest: what it will be given is not known.
    """
    order, inverse = factor.order, factor.inverse
    left = weight[:, order]
    # w L, so that w H w' is its square.
    size = torch.linalg.solve_triangular(inverse, left, upper=False, left=False).square_().sum()
    codes = torch.empty(weight.shape, dtype=grid.dtype, device=weight.device)
    error = torch.zeros((), device=weight.device)
    for first in reversed(range(0, len(order), block)):
        last = min(first + block, len(order))
        columns = order[first:last]
        some = grid.of_columns(columns, len(weight))
        rounded, errors = _round_block(left[:, first:last], inverse[first:last, first:last], some)
        codes[:, columns] = rounded.to(codes.dtype)
        # d = E L for the differences d of weights, with H^-1 = L' L: so d H d' is E E'.
        error += errors.square().sum()
        left[:, :first].addmm_(errors, inverse[first:last, :first], alpha=-1)
    return codes, float(error / size) if size > 0 else None


def _round_block(left: Tensor, inverse: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes and errors [N, columns] of the columns `left`, from the last to the first."""
    if left.is_cuda:
        from headrace.runtime.calibration.gptq_triton import round_block

        return round_block(left, inverse, grid)
    left = left.clone()
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    for i in reversed(range(left.shape[1])):
        codes[:, i], value = grid.nearest(i, left[:, i])
        errors[:, i] = (left[:, i] - value) / inverse[i, i]
        left[:, :i] -= errors[:, i, None] * inverse[i, :i]
    return codes, errors
