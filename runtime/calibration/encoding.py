"""From a matrix and what its inputs are to the bytes that a store keeps of it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headrace.runtime.calibration.awq import output_error
from headrace.runtime.calibration.gptq import gptq
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
class Rounded:
    """Codes [N, K] on the host, and their grid; `absmax` are NF4's scales where those are quantized, too. `error` is the
    outputs' squared error over their square, by the inputs seen, None where there were none."""

    codes: Tensor
    grid: Grid
    absmax: Tensor | None
    error: float | None


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


def round_matrix(plan: WeightPlan, weight: Tensor, gram: Tensor | None, method: Method) -> Rounded:
    """`weight` [N, K] float32, given inputs' second moments [K, K]; to nearest where there are none."""
    found = chosen(plan, weight, gram, method)
    codes = _small(plan, found.codes)
    if gram is None:
        return Rounded(codes, found.grid, found.absmax, None)
    size = output_error(torch.zeros_like(weight), weight, gram)
    error = output_error(weight, found.values, gram) / size if size > 0 else None
    return Rounded(codes, found.grid, found.absmax, error)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Codes and the values that they stand for, both [N, K] float32; the rest as in Rounded."""

    codes: Tensor
    values: Tensor
    grid: Grid
    absmax: Tensor | None


def chosen(plan: WeightPlan, weight: Tensor, gram: Tensor | None, method: Method) -> Chosen:
    """`round_matrix` before anything is packed."""
    if gram is None:
        grid, absmax = make_grid(plan, weight)
        return Chosen(*grid.round(weight), grid, absmax)
    block = block_of(plan)
    if method == "gptq":
        # What an error costs beside others, which later columns make up for, is its column's part.
        grid, absmax = make_grid(plan, weight, weighted_squares(gram.diagonal(), block))
        return Chosen(*gptq(weight, gram, grid), grid, absmax)
    whole = weight.shape[-1] % block == 0
    errors = output_errors(gram, block) if whole else weighted_squares(gram.diagonal(), block)
    grid, absmax = make_grid(plan, weight, errors)
    return Chosen(*grid.round(weight), grid, absmax)


def _small(plan: WeightPlan, codes: Tensor) -> Tensor:
    """In a byte each, on the host."""
    return codes.to(torch.int8 if plan.format == "int8" else torch.uint8).cpu()


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
