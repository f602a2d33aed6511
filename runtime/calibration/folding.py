"""Where a division of a matrix's input channels can be made before it: found by trying.

The norm before a matrix, or the rows of the matrix before it, may make its input channels smaller by factors
that its columns are larger by. Whether that leaves a layer's output as it is depends on what else sees the same
channels, so it is tried on a few tokens, with powers of two, which change no bit of a product.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headrace.runtime.calibration.layer_weights import LayerWeights
from headrace.runtime.manifest import LayerShape

log = logging.getLogger(__name__)

_SAME = 0.05
"""Of what larger columns alone change: as much may be left of it by a fold, as rounding in 16 bits. A wrong fold
leaves all of it, or more."""


class Fold(Protocol):
    """Something before a matrix that can divide its input channels."""

    @property
    def names(self) -> tuple[str, ...]:
        """The weights that are changed."""

    def shared(self, scales: Tensor) -> Tensor:
        """Scales [K] made equal where this can only divide channels alike."""

    def divided(self, weights: LayerWeights, scales: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What channels are really divided by, [K] float32, and what its weights have to be for that."""


@dataclass(frozen=True, slots=True)
class NormFold:
    """A norm's weight, to which the model adds `added` first (1 in Gemma's), and its bias."""

    weight: str
    bias: str | None
    added: int

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def shared(self, scales: Tensor) -> Tensor:
        return scales

    def divided(self, weights: LayerWeights, scales: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        stored = weights.raw(self.weight)
        before = stored.float() + self.added
        divided = (before / scales - self.added).to(stored.dtype)
        # Of a weight in 16 bits: what the division became, so that columns make up for just that.
        after = divided.float() + self.added
        real = before / after
        good = torch.isfinite(real) & (real > 0)
        real = torch.where(good, real, 1.0)
        found = {self.weight: torch.where(good, divided, stored)}
        if self.bias is not None:
            found[self.bias] = weights.raw(self.bias).float() / real
        return real, found


@dataclass(frozen=True, slots=True)
class RowsFold:
    """The last `rows` rows of a linear before, and of its bias.

    Each row makes one channel; or, with fewer key heads than heads, `repeats` of them: [heads, repeats, dim].
    """

    weight: str
    bias: str | None
    rows: int
    repeats: int
    dim: int

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def shared(self, scales: Tensor) -> Tensor:
        return self._channels(self._rows(scales))

    def _rows(self, scales: Tensor) -> Tensor:
        return scales.view(-1, self.repeats, self.dim).mean(dim=1).reshape(-1)

    def _channels(self, rows: Tensor) -> Tensor:
        each = rows.view(-1, 1, self.dim)
        return each.expand(-1, self.repeats, -1).reshape(-1)

    def divided(self, weights: LayerWeights, scales: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows = self._rows(scales)
        found = {}
        for name in self.names:
            values = weights.values(name)
            part = values[-self.rows :]
            part /= rows.view(-1, *[1] * (part.dim() - 1))
            found[name] = values
        return self._channels(rows), found


def find_fold(
    weights: LayerWeights,
    matrices: Sequence[str],
    producers: Sequence[str],
    shape: LayerShape,
    run: Callable[[], Tensor],
) -> Fold | None:
    """What can divide the common input of the linears `matrices`, if anything can.

    `producers` are linears that may be before them; `run` gives what the layer makes of a few tokens [T, H], less
    what it was given.
    """
    before = run()
    columns = weights.shape(matrices[0])[-1]
    random = torch.Generator().manual_seed(0)
    powers = torch.randint(-3, 4, (columns,), generator=random).float().exp2().to(weights.device)

    def change(names: Sequence[str], alter: Callable[[], None]) -> float:
        with weights.restored(*names):
            alter()
            return float((run() - before).abs().amax())

    def multiply(scales: Tensor) -> None:
        for name in matrices:
            weights.raw(name).mul_(scales)

    alone = change(matrices, lambda: multiply(powers))
    for fold in _candidates(weights, columns, producers, shape):
        # Rows that make several channels divide them alike, by powers of two again.
        scales = fold.shared(powers).log2().round().exp2()

        def both(fold: Fold = fold, scales: Tensor = scales) -> None:
            real, found = fold.divided(weights, scales)
            multiply(real)
            for name, values in found.items():
                weights.raw(name).copy_(values)

        if change((*matrices, *fold.names), both) < _SAME * alone:
            return fold
    return None


def _candidates(
    weights: LayerWeights, columns: int, producers: Sequence[str], shape: LayerShape
) -> Iterator[Fold]:
    for name, role in weights.roles.items():
        if (
            role.kind == "other"
            and role.attribute == "weight"
            and weights.shape(name) == (columns,)
        ):
            for added in (0, 1):
                yield NormFold(name, weights.beside(name), added)
    values = shape.kv_heads * shape.v_dim
    for name in producers:
        rows, bias = weights.shape(name)[0], weights.beside(name)
        if rows >= columns:
            yield RowsFold(name, bias, columns, 1, columns)
        if rows >= values and columns % values == 0 and columns != values:
            yield RowsFold(name, bias, values, columns // values, shape.v_dim)
