"""Weights of affine codes, from whatever tool, once their codes can be had in rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.runtime.conversion.readers.packing import pack, repacked
from headrace.runtime.conversion.source import SourceTensor, SourceWeight
from headrace.scheduler.errors import StoreError


@dataclass(frozen=True, slots=True)
class Scales:
    """`scale` [rows, groups] in a 16- or 32-bit type; `zero` uint8 of its shape, or None: half of
    the codes' range everywhere."""

    scale: Tensor
    zero: Tensor | None


@dataclass(frozen=True, slots=True)
class AffineWeight:
    """A weight [rows, columns] of `bits` bits that is (code - zero) * scale.

    `codes` yields uint8 [some rows, columns], consecutive rows, when it is stored; `scales` reads the
    rest. `scale_dtype` is safetensors' name of the scales' type, `has_zeros` says whether there are zero points.
    """

    name: str
    bits: int
    shape: tuple[int, int]
    groups: int
    data: SourceTensor
    scale_dtype: str
    has_zeros: bool
    codes: Callable[[], Iterator[Tensor]]
    scales: Callable[[], Scales]
    order: Tensor | None = None

    def source(self) -> SourceWeight:
        """Stored as int4; or as int8g, signed, with an offset in the place of zero points."""
        rows, columns = self.shape
        if columns % self.groups or (self.bits == 4 and columns % 2):
            raise StoreError(
                f"{self.name} has {columns} columns in {self.groups} groups, which are not equal and even; "
                "convert the original, unquantized checkpoint"
            )
        each = (rows, self.groups)
        # An offset is a product of 8 and at most 11 bits: float32 holds it as it is.
        wide = self.bits == 8 and self.has_zeros
        others: dict[str, tuple[str, tuple[int, ...]]]
        others = {"scale": ("F32" if wide else self.scale_dtype, each)}
        if self.has_zeros:
            others["offset" if wide else "zero"] = ("F32" if wide else "U8", each)
        if self.order is not None:
            others["order"] = ("I32", (columns,))
        fmt = "int4" if self.bits == 4 else "int8g"
        return repacked(self.name, fmt, self.shape, self.data, others, self._pieces)

    def _pieces(self) -> Iterator[tuple[str, Tensor]]:
        for codes in self.codes():
            some = codes if self.order is None else codes.index_select(1, self.order)
            yield "data", pack(some) if self.bits == 4 else (some ^ 128).view(torch.int8)
        found = self.scales()
        wide = self.bits == 8 and self.has_zeros
        yield "scale", found.scale.float() if wide else found.scale
        if found.zero is not None:
            offset = (128 - found.zero.float()) * found.scale.float()
            yield ("offset", offset) if wide else ("zero", found.zero)
        if self.order is not None:
            yield "order", self.order
