"""From a matrix and what its inputs are to the bytes that a store keeps of it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from headrace.runtime.calibration.awq import output_error, output_size
from headrace.runtime.calibration.gptq import Factor, gptq
from headrace.runtime.calibration.grids import (
    AffineGrid,
    Errors,
    Grid,
    TableGrid,
    affine_grid,
    output_errors,
    row_grid,
    table_grid,
    weighted_squares,
)
from headrace.runtime.conversion.affine import BITS, pack
from headrace.runtime.conversion.described import WeightPlan
from headrace.runtime.conversion.quantize import (
    BLOCKSIZE,
    double_quantized,
    nf4_table,
    nf4_tail,
)
from headrace.scheduler.errors import StoreError

log = logging.getLogger(__name__)

Method = Literal["gptq", "awq"]
CALIBRATED = ("int4", "int3", "nf4", "int8")
"""Formats whose roundings can be calibrated."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is known of a matrix's inputs x [K] float32: mean squares [K]; and the means of x x' [K, K] for
    awq, or what gptq makes of them."""

    squares: Tensor
    gram: Tensor | None
    factor: Factor | None

    @classmethod
    def of(cls, gram: Tensor, method: Method) -> "Inputs":
        """`gram` [K, K] is kept for awq alone: whoever has no need of it lets go of it."""
        if method == "awq":
            return cls(gram.diagonal(), gram, None)
        return cls(gram.diagonal().clone(), None, Factor.of(gram))


@dataclass(frozen=True, slots=True)
class Rounded:
    """Codes [N, K], small whole numbers, and their grid; `absmax` are NF4's scales where those are quantized, too.
    `error` is the outputs' squared error over their square, by the inputs seen, None where there were none."""

    codes: Tensor
    grid: Grid
    absmax: Tensor | None
    error: float | None

    @property
    def values(self) -> Tensor:
        """What the codes stand for, [N, K] float32."""
        return self.grid.values(self.codes)

    def on_host(self) -> "Rounded":
        return replace(self, codes=self.codes.cpu())


def block_of(plan: WeightPlan) -> int:
    """Consecutive elements of the weight that share a scale."""
    if plan.format == "nf4":
        return BLOCKSIZE
    columns = plan.source.shape[-1]
    if plan.format == "int8":
        return columns
    return columns // next(part.entry.shape[-1] for part in plan.parts if part.role == "scale")


def make_grid(
    plan: WeightPlan, weight: Tensor, errors: Errors | None = None
) -> tuple[Grid, Tensor | None]:
    """A grid for `weight` [N, K] float32 as `plan` will store it, and NF4's scales before they are quantized.

    Raises StoreError for values that the format cannot have.
    """
    name = plan.source.name
    if not bool(torch.isfinite(weight).all()):
        raise StoreError(f"{name} holds NaN or infinity, which cannot be quantized")
    if plan.format == "int8":
        return row_grid(weight, errors), None
    if plan.format in BITS:
        grid = affine_grid(weight, block_of(plan), BITS[plan.format], errors)
        if not bool(torch.isfinite(grid.scale).all()):
            raise StoreError(
                f"{name} has values too large for {plan.format}'s float16 scales; keep it with "
                f"--policy '{name}=keep'"
            )
        return grid, None
    assert plan.format == "nf4", plan.format
    table = nf4_table().to(weight.device)
    found = table_grid(weight, table, BLOCKSIZE, errors)
    if not is_double(plan):
        return found, None
    scale = double_quantized(found.scale.cpu()).to(weight.device)
    return TableGrid(scale, table, BLOCKSIZE, weight.shape[-1]), found.scale


def is_double(plan: WeightPlan) -> bool:
    return any(part.role == "nested_absmax" for part in plan.parts)


def nearest(plan: WeightPlan) -> Callable[[Tensor], Tensor]:
    """Rounding to nearest as `plan` stores: weights to values, both [N, K] float32."""
    return lambda weight: make_grid(plan, weight)[0].round(weight)[1]


def round_matrix(plan: WeightPlan, weight: Tensor, inputs: Inputs | None) -> Rounded:
    """`weight` [N, K] float32, by what is known of its inputs; to nearest where nothing is."""
    if inputs is None:
        grid, absmax = make_grid(plan, weight)
        return Rounded(grid.round(weight)[0].to(grid.dtype), grid, absmax, None)
    block = block_of(plan)
    # What an error costs beside others: with gptq, where later columns make up for those, its column's part.
    errors = weighted_squares(inputs.squares, block)
    if inputs.factor is not None:
        grid, absmax = make_grid(plan, weight, errors)
        codes, error = gptq(weight, inputs.factor, grid)
        return Rounded(codes, grid, absmax, error)
    gram = inputs.gram
    assert gram is not None
    if weight.shape[-1] % block == 0:
        errors = output_errors(gram, block)
    grid, absmax = make_grid(plan, weight, errors)
    codes, values = grid.round(weight)
    error, size = output_error(weight, values, gram), output_size(weight, gram)
    return Rounded(codes.to(grid.dtype), grid, absmax, error / size if size > 0 else None)


def stored(plan: WeightPlan, matrices: list[Rounded]) -> list[tuple[str, Tensor]]:
    """(stored name, tensor on the host) in stored order, of a weight that is these matrices, one after
    the other."""
    names = {part.role: part.entry for part in plan.parts}
    codes = torch.cat([each.codes.reshape(-1) for each in matrices])
    grids = [each.grid for each in matrices]
    scale = torch.cat([grid.numbers[0] for grid in grids]).cpu()
    if plan.format == "int8":
        # Stores divide by 127 when they are read.
        tail = {"scale": scale * 127, "layout": torch.zeros((), dtype=torch.uint8)}
        data = codes
    elif plan.format in BITS:
        zeros = [grid.zero for grid in grids if isinstance(grid, AffineGrid)]
        tail = {"scale": scale.half(), "zero": torch.cat(zeros).cpu().to(torch.uint8)}
        columns = plan.source.shape[-1]
        data = pack(codes.view(-1, columns), BITS[plan.format])
    else:
        absmax = [each.grid.numbers[0] if each.absmax is None else each.absmax for each in matrices]
        whole = torch.cat(absmax).cpu()
        tail = dict(nf4_tail(whole, is_double(plan), plan.dtype, plan.source.shape))
        data = _packed(codes)
    parts = {"data": data} | tail
    return [
        (part.entry.name, parts[part.role].reshape(names[part.role].shape)) for part in plan.parts
    ]


def _packed(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the high nibble; with an odd one, a zero follows."""
    if len(codes) % 2:
        codes = torch.cat((codes, codes.new_zeros(1)))
    return codes[::2] << 4 | codes[1::2]
