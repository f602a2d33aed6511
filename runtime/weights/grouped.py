"""Weights whose parts are rows of codes and, for each row, scales of groups of its columns."""

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from math import prod

import torch
from torch import Tensor

from headrace.runtime.matmul.configs import LEAST_GROUP, Codes
from headrace.runtime.matmul.few_rows import multiply
from headrace.runtime.store import WeightSpec
from headrace.runtime.weights.affine import int3_values, int4_values, int8_values
from headrace.runtime.weights.small_floats import mxfp4_values
from headrace.runtime.weights.weight import Scratch, Weight, room_for, tracer_of


class GroupedWeight(Weight):
    """A matrix, or a stack of them, with one row of every part for each of its rows.

    `order` [columns], where given: the codes' column j belongs to the weight's column order[j].
    """

    def __init__(self, spec: WeightSpec, parts: dict[str, Tensor]) -> None:
        super().__init__(spec.shape)
        rows = prod(spec.shape[:-1])
        self._group = spec.blocksize
        self._order = parts.get("order")
        self._parts = {r: part.view(rows, -1) for r, part in parts.items() if r != "order"}

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    def rows(self, start: int, stop: int) -> Weight:
        each = prod(self.shape[1:-1])
        piece = copy(self)
        piece.shape = torch.Size((stop - start, *self.shape[1:]))
        piece._parts = {
            role: part[start * each : stop * each] for role, part in self._parts.items()
        }
        return piece

    def dense(self, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
        shape = tuple(self.shape)
        out = room_for(shape, dtype, self._parts["data"].device, scratch)
        values = self._fill(out.view(-1, shape[-1])).view(shape)
        if self._order is None:
            return values
        # Only who asks for the values themselves pays for this: products reorder x instead.
        return torch.empty_like(values).index_copy_(-1, self._order.long(), values)

    @abstractmethod
    def _fill(self, out: Tensor) -> Tensor:
        """Write the codes' values, [rows, columns] in the codes' order, into `out`."""

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        scratch: Scratch | None = None,
        transposed: bool = False,
    ) -> Tensor:
        if self._order is None or transposed:
            return super().linear(x, bias, scratch, transposed)
        plain = copy(self)
        plain._order = None
        return plain.linear(x.index_select(-1, self._order), bias, scratch)


class Int4Weight(GroupedWeight):
    """(code - zero) * scale, or code * scale + offset, of 4-bit codes; zero is 8 without either."""

    @property
    def kind(self) -> str:
        return "int4"

    @property
    def group(self) -> int:
        return self._group

    @property
    def _zeros(self) -> bool:
        return "zero" in self._parts

    @property
    def _is_fused(self) -> bool:
        """Whether the few-row kernel can multiply by it."""
        least = LEAST_GROUP[self._zeros]
        return "offset" not in self._parts and self._order is None and self._group >= least

    def _fill(self, out: Tensor) -> Tensor:
        parts = self._parts
        return int4_values(
            parts["data"], parts["scale"], parts.get("zero"), parts.get("offset"), out
        )

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        scratch: Scratch | None = None,
        transposed: bool = False,
    ) -> Tensor:
        found = None
        if self._is_fused and not transposed:
            found = multiply(x, [self], [bias], tracer_of(scratch))
        return super().linear(x, bias, scratch, transposed) if found is None else found[0]

    def together(
        self,
        others: Sequence[Weight],
        x: Tensor,
        biases: Sequence[Tensor | None],
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, ...] | None:
        weights = [self, *(weight for weight in others if isinstance(weight, Int4Weight))]
        alike = all(w._is_fused and w._zeros == self._zeros for w in weights)
        if len(weights) <= len(others) or not alike:
            return None
        return multiply(x, weights, biases, tracer_of(scratch))

    def codes(self) -> Codes:
        columns, depth = self.shape
        parts = self._parts
        zeros = parts["zero"].float().view(-1) if self._zeros else None
        scales = parts["scale"].float().view(-1)
        packed = parts["data"].view(-1)
        return Codes(self.kind, packed, scales, self._group, (columns, depth), zeros)


class Int3Weight(GroupedWeight):
    """(code - zero) * scale of 3-bit codes, which no kernel takes packed."""

    def _fill(self, out: Tensor) -> Tensor:
        return int3_values(self._parts["data"], self._parts["scale"], self._parts["zero"], out)


class GroupedInt8Weight(GroupedWeight):
    """code * scale, or code * scale + offset, of 8-bit codes."""

    def _fill(self, out: Tensor) -> Tensor:
        parts = self._parts
        return int8_values(parts["data"], parts["scale"], parts.get("offset"), out)


class Mxfp4Weight(GroupedWeight):
    """4-bit floats (e2m1), 32 of which share a power of two."""

    def _fill(self, out: Tensor) -> Tensor:
        return mxfp4_values(self._parts["data"], self._parts["scale"], out)
