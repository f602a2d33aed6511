"""Weights whose parts are rows of codes and, for each row, scales of groups of its columns."""

from abc import abstractmethod
from copy import copy
from math import prod

import torch
from torch import Tensor

from headrace.runtime.manifest import WeightSpec
from headrace.runtime.matmul.configs import Codes, Packing
from headrace.runtime.matmul.few_rows import packing_of
from headrace.runtime.weights.affine import Numbers, int3_values, int4_values, int8_values
from headrace.runtime.weights.small_floats import exponents, float4_values
from headrace.runtime.weights.weight import Scratch, Weight, room_for


class GroupedWeight(Weight):
    """A matrix, or a stack of them, with one row of every part for each of its rows.

    `order` [columns], where given: the codes' column j belongs to the weight's column order[j].
    """

    def __init__(self, spec: WeightSpec, parts: dict[str, Tensor]) -> None:
        super().__init__(spec.shape)
        rows = prod(spec.shape[:-1])
        self._group = spec.blocksize
        self._packing = packing_of(spec)
        self._order = parts.get("order")
        self._parts = {r: part.view(rows, -1) for r, part in parts.items() if r != "order"}

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def packing(self) -> Packing | None:
        return self._packing if self._order is None else None

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

    def _scale(self) -> Numbers:
        return Numbers(self._parts["scale"], self._parts.get("block_scale"))

    def _offset(self) -> Numbers | None:
        offset = self._parts.get("offset")
        return None if offset is None else Numbers(offset, self._parts.get("block_offset"))

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

    def _fill(self, out: Tensor) -> Tensor:
        parts = self._parts
        return int4_values(parts["data"], self._scale(), parts.get("zero"), self._offset(), out)

    def codes(self) -> Codes:
        columns, depth = self.shape
        parts = self._parts
        zeros = parts["zero"].view(-1) if "zero" in parts else None
        packed, scales = parts["data"].view(-1), parts["scale"].view(-1)
        return Codes("int4", packed, scales, self._group, (columns, depth), zeros)


class Int3Weight(GroupedWeight):
    """(code - zero) * scale of 3-bit codes, which no kernel takes packed."""

    def _fill(self, out: Tensor) -> Tensor:
        return int3_values(self._parts["data"], self._parts["scale"], self._parts["zero"], out)


class GroupedInt8Weight(GroupedWeight):
    """code * scale, or code * scale + offset, of 8-bit codes."""

    def _fill(self, out: Tensor) -> Tensor:
        return int8_values(self._parts["data"], self._scale(), self._offset(), out)


class Mxfp4Weight(GroupedWeight):
    """4-bit floats (e2m1), 32 of which share a power of two."""

    def _fill(self, out: Tensor) -> Tensor:
        return float4_values(
            self._parts["data"], lambda run: exponents(self._parts["scale"][run]), out
        )


class Nvfp4Weight(GroupedWeight):
    """4-bit floats (e2m1), 16 of which share an 8-bit float, and those of a row one scale more."""

    def _fill(self, out: Tensor) -> Tensor:
        scale, row_scale = self._parts["scale"], self._parts["row_scale"]
        return float4_values(
            self._parts["data"], lambda run: scale[run].float() * row_scale[run], out
        )
