"""What the matrices of a layer are multiplied by, noted while the layer runs."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from headrace.runtime.weights.weight import Scratch, Weight

Matrix = tuple[str, int | None]
"""A tensor's name, and the expert where the tensor is a stack of several experts' matrices."""

_ROWS = 4096
"""Rows of inputs that are taken in at a time."""

_COLUMNS = 2048
"""Rows of the sums that are added to at a time."""


class Moments:
    """What is kept of inputs x [K]: the sums of x x' [K, K] and |x| [K] in float32, and how many there were."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self._gram = torch.zeros(columns, columns, device=device)
        self._magnitude = torch.zeros(columns, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Takes in x [..., K]."""
        for rows in x.reshape(-1, x.shape[-1]).split(_ROWS):
            if rows.is_cuda and rows.dtype != torch.float32:
                self._add_narrow(rows)
            else:
                wide = rows.float()
                self._gram.addmm_(wide.T, wide)
            self._magnitude += rows.abs().sum(dim=0, dtype=torch.float32)
            self.count += len(rows)

    def _add_narrow(self, x: Tensor) -> None:
        """Tensor cores multiply 16 bits exactly and sum in float32, ten times as fast as in float32."""
        for part, columns in zip(self._gram.split(_COLUMNS), x.split(_COLUMNS, dim=1), strict=True):
            part += torch.mm(columns.T, x, out_dtype=torch.float32)

    def take_means(self) -> tuple[Tensor, Tensor]:
        """The means of x x' and |x|: the sums, divided where they lie, which are then no longer kept here."""
        assert self.count
        gram, self._gram = self._gram, torch.empty(0)
        gram /= self.count
        return gram, self._magnitude / self.count


class Watched(Weight):
    """A weight that tells `note` what it is multiplied by."""

    def __init__(
        self, weight: Weight, note: Callable[[Matrix, Tensor], None], matrix: Matrix
    ) -> None:
        super().__init__(tuple(weight.shape))
        self._weight, self._note, self._matrix = weight, note, matrix

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    @property
    def row_multiple(self) -> int:
        return self._weight.row_multiple

    def rows(self, start: int, stop: int) -> Weight:
        return self._weight.rows(start, stop)

    def dense(self, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
        return self._weight.dense(dtype, scratch)

    def expert(self, index: int) -> Weight:
        return Watched(self._weight.expert(index), self._note, (self._matrix[0], index))

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        scratch: Scratch | None = None,
        transposed: bool = False,
    ) -> Tensor:
        self._note(self._matrix, x)
        return self._weight.linear(x, bias, scratch, transposed)


class InputGroups:
    """Which matrices get the same tensor, in the order of the first calls, learnt from one micro-batch."""

    def __init__(self) -> None:
        self._groups: list[list[Matrix]] = []
        self._given: dict[int, tuple[Tensor, list[Matrix]]] = {}

    def note(self, matrix: Matrix, x: Tensor) -> None:
        # The tensor is kept, so that its id stays its own.
        known = self._given.get(id(x))
        if known is None:
            self._groups.append([])
            known = self._given[id(x)] = x, self._groups[-1]
        if matrix not in known[1]:
            known[1].append(matrix)

    def finish(self) -> list[tuple[Matrix, ...]]:
        self._given.clear()
        return [tuple(group) for group in self._groups]


class Collector:
    """Moments of the inputs of some matrices, one of each group."""

    def __init__(self, columns: Mapping[Matrix, int], device: torch.device) -> None:
        self._moments = {matrix: Moments(size, device) for matrix, size in columns.items()}

    def note(self, matrix: Matrix, x: Tensor) -> None:
        moments = self._moments.get(matrix)
        if moments is not None:
            moments.add(x)

    def take(self, matrix: Matrix) -> Moments:
        """The collector keeps them no longer."""
        return self._moments.pop(matrix)


def batches(columns: Mapping[Matrix, int], budget: int | None) -> "list[dict[Matrix, int]]":
    """The matrices in runs whose second moments together take at most `budget` bytes, or one each."""
    runs: list[dict[Matrix, int]] = []
    left = 0
    for matrix, size in columns.items():
        nbytes = 4 * size * size
        if not runs or (budget is not None and nbytes > left):
            runs.append({})
            left = 0 if budget is None else budget
        runs[-1][matrix] = size
        left -= nbytes
    return runs
