"""GGUF's quantized blocks as affine codes: the same values, with codes and scales apart.

A block is a run of 32 or 256 elements of a row, with its scales before or behind its codes; layouts as in
llama.cpp's ggml-common.h (block_q4_0 and its like) and dequantize_row_*. What has up to 4 bits becomes int4. Codes of
5 and 6 bits and of tables become int8, which there is a format for; no value changes by that.

Scales of the K-quants are products of a float16 and a 4- to 8-bit integer, which only float32 holds; so are those of IQ4_XS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Affine:
    """Codes [rows, columns]: uint8 0 to 15 of `bits` 4, or int8 of 8; value = code * scale + offset, with zero
    point 8 for 4 bits where there is no offset. Scales and offsets [rows, columns / group] are float16, those of
    K-quants float32."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None

    def values(self) -> Tensor:
        """float32 [rows, columns], as llama.cpp dequantizes them."""
        values = self._groups() * self.scale.float().view(-1, 1)
        if self.offset is not None:
            values += self.offset.float().view(-1, 1)
        return values.view(self.codes.shape)

    def _groups(self) -> Tensor:
        groups = self.codes.view(self.scale.numel(), -1).float()
        return groups.sub_(8) if self.codes.dtype == torch.uint8 and self.offset is None else groups

    def squares(self) -> tuple[float, float]:
        """The sum of all values' squares, and that of what rounding scales and offsets to float16 changes.

        Of a group's n codes c, (s c + o)^2 sums to s^2 sum(c^2) + 2 s o sum(c) + n o^2: both sums look at the
        codes once.
        """
        groups = self._groups()
        linear, square = groups.sum(1), torch.einsum("gk,gk->g", groups, groups)
        offset = torch.zeros_like(self.scale) if self.offset is None else self.offset

        def total(scale: Tensor, offset: Tensor) -> float:
            s, o = scale.double().flatten(), offset.double().flatten()
            return float((s * s * square + 2 * s * o * linear + groups.shape[1] * o * o).sum())

        change = total(self.scale.half() - self.scale, offset.half() - offset)
        return total(self.scale, offset), change


@dataclass(frozen=True, slots=True)
class BlockType:
    """`elements` in `nbytes`; they become codes of `bits`, a scale for each `group`, and with `has_offset` an
    offset."""

    elements: int
    nbytes: int
    bits: int
    group: int
    has_offset: bool
    unpack: Callable[[Tensor], Affine]


IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def unpack(kind: BlockType, data: Tensor) -> Affine:
    """`data` uint8 [rows, blocks * nbytes] of that type."""
    rows = len(data)
    found = kind.unpack(data.reshape(-1, kind.nbytes))
    codes, scale = found.codes.reshape(rows, -1), found.scale.reshape(rows, -1)
    offset = None if found.offset is None else found.offset.reshape(rows, -1)
    return Affine(codes, scale, offset)


def _halves(data: Tensor) -> Tensor:
    """Two bytes each, as float16."""
    return data.contiguous().view(torch.float16)


def _nibbles(data: Tensor) -> Tensor:
    """[blocks, n] to [blocks, 2 n]: all low ones, then all high ones."""
    return torch.cat((data & 15, data >> 4), dim=-1)


def _fifth_bits(data: Tensor) -> Tensor:
    """uint8 [blocks, 4] to bit 4 of 32 codes."""
    bits = torch.arange(8, dtype=torch.uint8)
    return ((data[:, :, None] >> bits) & 1).reshape(len(data), 32) << 4


def _q4_0(blocks: Tensor) -> Affine:
    return Affine(_nibbles(blocks[:, 2:]), _halves(blocks[:, :2]))


def _q4_1(blocks: Tensor) -> Affine:
    return Affine(_nibbles(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4]))


def _q5_0(blocks: Tensor) -> Affine:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return Affine(codes.to(torch.int8) - 16, _halves(blocks[:, :2]))


def _q5_1(blocks: Tensor) -> Affine:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return Affine(codes.to(torch.int8), _halves(blocks[:, :2]), _halves(blocks[:, 2:4]))


def _q8_0(blocks: Tensor) -> Affine:
    return Affine(blocks[:, 2:].contiguous().view(torch.int8), _halves(blocks[:, :2]))


def _iq4_nl(blocks: Tensor) -> Affine:
    values = torch.tensor(IQ4_NL_VALUES, dtype=torch.int8)
    return Affine(values[_nibbles(blocks[:, 2:]).int()], _halves(blocks[:, :2]))


def unpack_mxfp4(data: Tensor) -> tuple[Tensor, Tensor]:
    """`data` uint8 [rows, blocks * 17]: codes [rows, columns] of four-bit floats, and exponents of two plus 127
    [rows, blocks]. llama.cpp doubles the floats and halves the powers."""
    blocks = data.reshape(-1, 17)
    return _nibbles(blocks[:, 1:]).reshape(len(data), -1), blocks[:, :1].reshape(len(data), -1)


def _quarters(data: Tensor, run: int) -> Tensor:
    """[blocks, n run] to [blocks, 4 n run], two bits each: of a run all lowest ones first."""
    places = torch.tensor((0, 2, 4, 6), dtype=torch.uint8)[:, None]
    return ((data.reshape(len(data), -1, 1, run) >> places) & 3).reshape(len(data), -1)


def _bits(data: Tensor) -> Tensor:
    """[blocks, 32] to [blocks, 256]: all lowest bits first."""
    places = torch.arange(8, dtype=torch.uint8)[:, None]
    return ((data[:, None] >> places) & 1).reshape(len(data), -1)


def _iq4_xs(blocks: Tensor) -> Affine:
    low, high = blocks[:, 4:8], blocks[:, 2:4]
    scales = torch.stack((low & 15, low >> 4), dim=2).reshape(-1, 8) | _quarters(high, 1) << 4
    values = torch.tensor(IQ4_NL_VALUES, dtype=torch.int8)
    codes = values[_nibbles(blocks[:, 8:].reshape(-1, 8, 16)).int()]
    return Affine(codes, _halves(blocks[:, :2]).float() * (scales.float() - 32))


def _q2_k(blocks: Tensor) -> Affine:
    d, dmin = _halves(blocks[:, 80:82]).float(), _halves(blocks[:, 82:]).float()
    scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    return Affine(_quarters(blocks[:, 16:80], 32), d * scales, -dmin * minima)


def _q3_k(blocks: Tensor) -> Affine:
    """Codes of three bits less 4, which int4's are less 8."""
    codes = _quarters(blocks[:, 32:96], 32) + (_bits(blocks[:, :32]) << 2) + 4
    scales = _nibbles(blocks[:, 96:104]) | _quarters(blocks[:, 104:108], 4) << 4
    return Affine(codes, _halves(blocks[:, 108:]).float() * (scales.float() - 32))


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: scales and offsets [blocks, 8] in float32, from six bits each in 12 bytes."""
    d, dmin = _halves(blocks[:, :2]).float(), _halves(blocks[:, 2:4]).float()
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | (first >> 6) << 4), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6) << 4), dim=1)
    return d * scales, -dmin * minima


def _q4_k(blocks: Tensor) -> Affine:
    scale, offset = _k_scales(blocks)
    return Affine(_nibbles(blocks[:, 16:].reshape(-1, 4, 32)), scale, offset)


def _q5_k(blocks: Tensor) -> Affine:
    scale, offset = _k_scales(blocks)
    codes = (
        _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 256) | _bits(blocks[:, 16:48]) << 4
    )
    return Affine(codes.to(torch.int8), scale, offset)


def _q6_k(blocks: Tensor) -> Affine:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    high = _quarters(blocks[:, 128:192], 32)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    codes = (low | high << 4).to(torch.int8) - 32
    return Affine(codes, _halves(blocks[:, 208:]).float() * scales)


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, 4, 32, False, _q4_0),
    "Q4_1": BlockType(32, 20, 4, 32, True, _q4_1),
    "Q5_0": BlockType(32, 22, 8, 32, False, _q5_0),
    "Q5_1": BlockType(32, 24, 8, 32, True, _q5_1),
    "Q8_0": BlockType(32, 34, 8, 32, False, _q8_0),
    "Q4_K": BlockType(256, 144, 4, 32, True, _q4_k),
    "Q5_K": BlockType(256, 176, 8, 32, True, _q5_k),
    "Q6_K": BlockType(256, 210, 8, 16, False, _q6_k),
    "Q2_K": BlockType(256, 84, 4, 16, True, _q2_k),
    "Q3_K": BlockType(256, 110, 4, 16, False, _q3_k),
    "IQ4_XS": BlockType(256, 136, 8, 32, False, _iq4_xs),
    "IQ4_NL": BlockType(32, 18, 8, 32, False, _iq4_nl),
}
"""By the names of gguf.GGMLQuantizationType."""

MXFP4 = "MXFP4"
"""The one that is no affine codes."""
