"""The values that a quantized matrix can have: a scale for each block of weights, and codes times it.

Blocks are runs of consecutive elements of the flattened matrix [N, K], as they are in stores: a part of a
row (a group), or a whole row. Where K is no multiple of the block, a block goes on in the next row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

RATIOS = tuple(1 - step / 25 for step in range(13))
"""Shares of a block's range that are tried: 1 down to 0.52."""

_LEAST_SCALE = 2.0**-24
"""The least float16 above zero."""

Errors = Callable[[Tensor, int], Tensor]
"""(differences [blocks, block], index of the first block) -> their cost [blocks]."""


class Grid(Protocol):
    """Fixed scales of one matrix [N, K]. Codes are whole numbers, values what they stand for."""

    def nearest(self, column: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of column `column`'s weights [N] float32: codes [N] and values [N]."""

    def round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Of all weights [N, K] float32: codes and values of that shape."""

    def values(self, codes: Tensor) -> Tensor:
        """What codes [N, K] stand for, float32."""

    def of_columns(self, columns: Tensor, rows: int) -> "Grid":
        """Of these columns of `rows` rows alone: [rows, columns], a number for each element."""

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        """What is kept of each block."""

    @property
    def dtype(self) -> torch.dtype:
        """The smallest that codes fit into."""


@dataclass(frozen=True, slots=True)
class AffineGrid:
    """value = (code - zero) * scale with codes in [low, high]; scale and zero are float32 [blocks]."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int
    block: int
    columns: int

    def nearest(self, column: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        where = torch.tensor([column], device=weights.device)
        index = _blocks(len(weights), self.columns, where, self.block)
        return self._round(weights, self.scale[index], self.zero[index])

    def round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = (_spread(each, weight, self.block) for each in (self.scale, self.zero))
        return self._round(weight, scale, zero)

    def values(self, codes: Tensor) -> Tensor:
        scale, zero = (_spread(each, codes, self.block) for each in (self.scale, self.zero))
        return (codes - zero).mul_(scale)

    def of_columns(self, columns: Tensor, rows: int) -> "AffineGrid":
        index = _blocks(rows, self.columns, columns, self.block)
        return replace(
            self, scale=self.scale[index], zero=self.zero[index], block=1, columns=len(columns)
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.low < 0 else torch.uint8

    def _round(self, weights: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        codes = torch.round(weights / scale).add_(zero).clamp_(self.low, self.high)
        return codes, (codes - zero) * scale

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        return self.scale, self.zero


@dataclass(frozen=True, slots=True)
class TableGrid:
    """value = table[code] * scale: NF4, whose table is sorted; scale is float32 [blocks]."""

    scale: Tensor
    table: Tensor
    block: int
    columns: int
    _borders: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_borders", (self.table[1:] + self.table[:-1]) / 2)

    def nearest(self, column: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        where = torch.tensor([column], device=weights.device)
        index = _blocks(len(weights), self.columns, where, self.block)
        return self._round(weights, self.scale[index])

    def round(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self._round(weight, _spread(self.scale, weight, self.block))

    def values(self, codes: Tensor) -> Tensor:
        return self.table[codes.int()].mul_(_spread(self.scale, codes, self.block))

    def of_columns(self, columns: Tensor, rows: int) -> "TableGrid":
        index = _blocks(rows, self.columns, columns, self.block)
        return TableGrid(self.scale[index], self.table, 1, len(columns))

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    def _round(self, weights: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        # A block of zeros has scale 0 and stays zeros.
        relative = weights / scale.clamp(min=torch.finfo(torch.float32).tiny)
        codes = torch.bucketize(relative, self._borders)
        return codes, self.table[codes] * scale

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        return (self.scale,)


def _blocks(rows: int, width: int, columns: Tensor, block: int) -> Tensor:
    """The blocks of these columns' elements, of rows of `width`: [rows * columns]."""
    starts = torch.arange(rows, device=columns.device)[:, None] * width
    return (starts + columns).view(-1) // block


def _spread(each: Tensor, weight: Tensor, block: int) -> Tensor:
    """A number of each block [blocks] to each element of `weight`."""
    return each.repeat_interleave(block)[: weight.numel()].view_as(weight)


def affine_grid(
    weight: Tensor, block: int, bits: int = 4, errors: Errors | None = None
) -> AffineGrid:
    """Codes 0 ... 2^bits - 1 between each block's least and greatest weight, zero among them.

    Scales are numbers of float16, as they are stored (infinite where that has none), zeros are whole. With
    `errors`, of RATIOS of the range the one that costs least is taken, for each block.
    """
    top = 2**bits - 1

    def fit(blocks: Tensor, ratio: float) -> AffineGrid:
        low = blocks.amin(dim=1).clamp(max=0) * ratio
        high = blocks.amax(dim=1).clamp(min=0) * ratio
        scale = stored_scale((high - low) / top)
        zero = torch.round(-low / scale).clamp(0, top)
        return AffineGrid(scale, zero, 0, top, block, block)

    scale, zero = _fitted(weight, block, fit, errors)
    return AffineGrid(scale, zero, 0, top, block, weight.shape[-1])


def stored_scale(scale: Tensor) -> Tensor:
    """Scales as float16 keeps them, and none zero: a block of zeros must not become 0/0."""
    return scale.clamp(min=_LEAST_SCALE).half().float()


def row_grid(weight: Tensor, errors: Errors | None = None) -> AffineGrid:
    """int8 by rows: codes -127 ... 127, the scale a row's largest magnitude over 127."""

    def fit(blocks: Tensor, ratio: float) -> AffineGrid:
        largest = blocks.abs().amax(dim=1) * ratio
        # What a store divides by 127 when it is read.
        scale = largest.clamp(min=torch.finfo(torch.float32).tiny * 127) / 127
        return AffineGrid(scale, torch.zeros_like(scale), -127, 127, block, block)

    block = weight.shape[-1]
    scale, zero = _fitted(weight, block, fit, errors)
    return AffineGrid(scale, zero, -127, 127, block, block)


def table_grid(
    weight: Tensor, table: Tensor, block: int, errors: Errors | None = None
) -> TableGrid:
    """Codes of a table that goes from -1 to 1; the scale is a block's largest magnitude."""

    def fit(blocks: Tensor, ratio: float) -> TableGrid:
        return TableGrid(blocks.abs().amax(dim=1) * ratio, table, block, block)

    (scale,) = _fitted(weight, block, fit, errors)
    return TableGrid(scale, table, block, weight.shape[-1])


_ELEMENTS = 1 << 23
"""Weights that are fitted at a time."""

Fit = Callable[[Tensor, float], Grid]
"""A grid for blocks [blocks, block], each of which is a row; the range that it covers times a ratio."""


def _fitted(weight: Tensor, block: int, fit: Fit, errors: Errors | None) -> list[Tensor]:
    """The numbers of the grids that `fit` makes, each block's with the best of RATIOS."""
    flat = weight.reshape(-1)
    short = -len(flat) % block
    if short:
        flat = torch.cat((flat, flat.new_zeros(short)))
    found = []
    blocks = flat.view(-1, block)
    at_once = max(1, _ELEMENTS // block)
    for first in range(0, len(blocks), at_once):
        some = blocks[first : first + at_once]
        if errors is None:
            found.append(fit(some, 1.0).numbers)
        else:
            found.append(_best(some, first, fit, errors))
    return [torch.cat(each) for each in zip(*found, strict=True)]


def _best(blocks: Tensor, first: int, fit: Fit, errors: Errors) -> tuple[Tensor, ...]:
    best: tuple[Tensor, ...] = ()
    least = blocks.new_full((len(blocks),), torch.inf)
    for ratio in RATIOS:
        grid = fit(blocks, ratio)
        cost = errors(grid.round(blocks)[1] - blocks, first)
        better = cost < least
        least = torch.where(better, cost, least)
        pairs = zip(grid.numbers, best or grid.numbers, strict=True)
        best = tuple(torch.where(better, new, old) for new, old in pairs)
    return best


def weighted_squares(importance: Tensor, block: int) -> Errors:
    """Squared differences, each column's times its `importance` [K]: what an output's error is, if
    inputs are independent and of mean square `importance`."""
    columns = len(importance)

    def cost(difference: Tensor, first: int) -> Tensor:
        if columns % block == 0:
            period = importance.view(-1, block)
            which = (first + torch.arange(len(difference), device=difference.device)) % len(period)
            return difference.square().mul_(period[which]).sum(dim=1)
        start = torch.arange(len(difference), device=difference.device)[:, None] + first
        place = start * block + torch.arange(block, device=difference.device)
        return difference.square().mul_(importance[place % columns]).sum(dim=1)

    return cost


def output_errors(gram: Tensor, block: int) -> Errors:
    """What differences do to an output, block by block: d' H d with the block's part of the inputs' second
    moments `gram` [K, K]. K must be a multiple of the block."""
    groups = gram.shape[0] // block
    part = torch.stack(
        [gram[i * block : (i + 1) * block, i * block : (i + 1) * block] for i in range(groups)]
    )

    def cost(difference: Tensor, first: int) -> Tensor:
        which = (first + torch.arange(len(difference), device=difference.device)) % groups
        found = difference.new_empty(len(difference))
        for group in range(groups):
            mine = (which == group).nonzero().view(-1)
            some = difference[mine]
            found[mine] = (some @ part[group]).mul_(some).sum(dim=1)
        return found

    return cost
