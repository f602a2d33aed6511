"""GGUF's quantized blocks as affine codes: the same values, with codes and scales apart.

A block is a run of 32 or 256 elements of a row, with its scales before or behind its codes; layouts as in
llama.cpp's ggml-common.h (block_q4_0 and its like) and dequantize_row_*. What has up to 4 bits becomes int4. Codes of
5 and 6 bits and of tables become int8, which there is a format for; no value changes by that.

Scales of the K-quants are products of a float16 and a 4- to 8-bit integer, which only float32 holds; so are those of IQ4_XS.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Affine:
    """Codes [rows, columns]: uint8 0 to 15 of `bits` 4, or int8 of 8; value = code * scale + offset, with zero
    point 8 for 4 bits where there is no offset. Scales and offsets [rows, columns / group] are float16, or
    whole numbers times those of their blocks, float16 [rows, blocks]."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None
    block_scale: Tensor | None = None
    block_offset: Tensor | None = None

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """What there is beside the codes, by role, in stored order."""
        for role in ("scale", "offset", "block_scale", "block_offset"):
            part = getattr(self, role)
            if part is not None:
                yield role, part


@dataclass(frozen=True, slots=True)
class BlockType:
    """`elements` in `nbytes`; they become codes of `bits`, a scale of that type for each `group`, and with `has_offset`
    an offset. Where they are no floats, there are those of blocks."""

    elements: int
    nbytes: int
    bits: int
    group: int
    has_offset: bool
    unpack: Callable[[Tensor], Affine]
    scale: str = "F16"

    def parts(self, columns: int) -> Iterator[tuple[str, str, int]]:
        """(role, type, columns) of what there is beside the codes, in stored order."""
        roles = ("scale", "offset") if self.has_offset else ("scale",)
        for role in roles:
            yield role, self.scale, columns // self.group
        if self.scale != "F16":
            for role in roles:
                yield f"block_{role}", "F16", columns // self.elements


IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def unpack(kind: BlockType, data: Tensor) -> Affine:
    """`data` uint8 [rows, blocks * nbytes] of that type."""
    found = kind.unpack(data.reshape(-1, kind.nbytes))
    sides = {role: part.reshape(len(data), -1) for role, part in found.parts()}
    return Affine(found.codes.reshape(len(data), -1), **sides)


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
    return Affine(codes, _centred(scales), block_scale=_halves(blocks[:, :2]))


def _centred(scales: Tensor) -> Tensor:
    """Numbers of six bits around 32."""
    return scales.to(torch.int8) - 32


def _q2_k(blocks: Tensor) -> Affine:
    d, dmin = _halves(blocks[:, 80:82]), _halves(blocks[:, 82:])
    scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    return Affine(_quarters(blocks[:, 16:80], 32), scales, minima, d, -dmin)


def _q3_k(blocks: Tensor) -> Affine:
    """Codes of three bits less 4, which int4's are less 8."""
    codes = _quarters(blocks[:, 32:96], 32) + (_bits(blocks[:, :32]) << 2) + 4
    scales = _nibbles(blocks[:, 96:104]) | _quarters(blocks[:, 104:108], 4) << 4
    return Affine(codes, _centred(scales), block_scale=_halves(blocks[:, 108:]))


def _with_k_scales(codes: Tensor, blocks: Tensor) -> Affine:
    """Of Q4_K and Q5_K, whose scales and minima have six bits each in 12 bytes."""
    d, dmin = _halves(blocks[:, :2]), _halves(blocks[:, 2:4])
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | (first >> 6) << 4), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6) << 4), dim=1)
    return Affine(codes, scales, minima, d, -dmin)


def _q4_k(blocks: Tensor) -> Affine:
    return _with_k_scales(_nibbles(blocks[:, 16:].reshape(-1, 4, 32)), blocks)


def _q5_k(blocks: Tensor) -> Affine:
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 256)
    return _with_k_scales((codes | _bits(blocks[:, 16:48]) << 4).to(torch.int8), blocks)


def _q6_k(blocks: Tensor) -> Affine:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    high = _quarters(blocks[:, 128:192], 32)
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    codes = _centred(low | high << 4)
    return Affine(codes, scales, block_scale=_halves(blocks[:, 208:]))


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, 4, 32, False, _q4_0),
    "Q4_1": BlockType(32, 20, 4, 32, True, _q4_1),
    "Q5_0": BlockType(32, 22, 8, 32, False, _q5_0),
    "Q5_1": BlockType(32, 24, 8, 32, True, _q5_1),
    "Q8_0": BlockType(32, 34, 8, 32, False, _q8_0),
    "Q4_K": BlockType(256, 144, 4, 32, True, _q4_k, "U8"),
    "Q5_K": BlockType(256, 176, 8, 32, True, _q5_k, "U8"),
    "Q6_K": BlockType(256, 210, 8, 16, False, _q6_k, "I8"),
    "Q2_K": BlockType(256, 84, 4, 16, True, _q2_k, "U8"),
    "Q3_K": BlockType(256, 110, 4, 16, False, _q3_k, "I8"),
    "IQ4_XS": BlockType(256, 136, 8, 32, False, _iq4_xs, "I8"),
    "IQ4_NL": BlockType(32, 18, 8, 32, False, _iq4_nl),
}
"""By the names of gguf.GGMLQuantizationType."""

MXFP4 = "MXFP4"
"""The one that is no affine codes."""
