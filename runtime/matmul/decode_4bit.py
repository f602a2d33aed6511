"""Four-bit codes to 16-bit floats in registers: the PTX that the matmul kernel inlines.

One piece of PTX takes two neighbouring words of a row, 16 codes as they are stored (even k in the
high nibble), and their scale, and leaves eight registers of two values each: a tensor core's
operand wants two neighbouring columns in one register. Register p becomes a column pair of plane p,
and an operand is the eight planes side by side, so its values are not consecutive in k: the
activations are put in the same order once a call (_order_kernel).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from headrace.runtime.bnb import functional

WORD = 8
"""Codes in a word of 32 bits."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How codes become values of one 16-bit type.

    `asm` takes $8 and $9, the words, $10, the scale of each, and with `zeros` $11, minus the zero
    points, less `magic`. Values are (n - zero) * scale for `affine` codes n, else table[n] * scale.
    """

    asm: str
    constraints: str
    affine: bool
    zeros: bool


@cache
def decoding(kind: str, dtype: torch.dtype, zeros: bool) -> Decoding:
    """For `kind` "nf4", "fp4" or "int4"; int4 without `zeros` has the zero point 8 everywhere."""
    suffix = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}[dtype]
    affine = kind == "int4"
    lines = _affine(dtype, suffix, zeros) if affine else _table(kind, dtype, suffix)
    constraints = ",".join(["=&r"] * 8 + ["r"] * (3 + zeros))
    return Decoding("\n".join(("{", *lines, "}")), constraints, affine, zeros)


def _table(kind: str, dtype: torch.dtype, suffix: str) -> list[str]:
    """A look-up is two byte look-ups, of the low and of the high bytes, four codes at a time: prmt
    picks by three bits among eight entries, and the fourth bit chooses between two such picks.

    2.6 integer operations and half a multiplication a value.
    """
    entries = [f"{entry & 0xFFFFFFFF:#x}" for entry in table(kind, dtype).tolist()]
    low, high = entries[:4], entries[4:]
    lines = [
        ".reg .b32 negative_zero, s, r, m, la, lb, ha, hb;",
        "mov.b32 negative_zero, 0x80008000;",
    ]
    for word in range(2):
        lines += [f"and.b32 s, ${8 + word}, 0x77777777;", f"shl.b32 r, ${8 + word}, 4;"]
        for half in range(2):
            if half:
                lines.append("shr.u32 s, s, 16;")
            # A byte's sign bit is bit 3 of its high code; four bits shifted, of its low code.
            signs = ("0x9D8C", "0xBFAE")[half]
            lines += [
                f"prmt.b32 m, ${8 + word}, r, {signs};",
                f"prmt.b32 la, {low[0]}, {low[1]}, s;",
                f"prmt.b32 lb, {low[2]}, {low[3]}, s;",
                f"prmt.b32 ha, {high[0]}, {high[1]}, s;",
                f"prmt.b32 hb, {high[2]}, {high[3]}, s;",
                "lop3.b32 la, m, lb, la, 0xCA;",
                "lop3.b32 ha, m, hb, ha, 0xCA;",
            ]
            for pair, bytes_ in enumerate(("0x4051", "0x6273")):
                out = f"${word * 4 + half * 2 + pair}"
                lines += [
                    f"prmt.b32 {out}, la, ha, {bytes_};",
                    f"fma.rn.{suffix} {out}, {out}, $10, negative_zero;",
                ]
    return lines


def magic(dtype: torch.dtype) -> int:
    """A float that holds a code in its lowest bits as it is: magic + n for bits | n."""
    return 128 if dtype == torch.bfloat16 else 1024


def _affine(dtype: torch.dtype, suffix: str, zeros: bool) -> list[str]:
    """(magic | n) - (magic + zero), exact, times the scale: 1 integer operation a value."""
    bits, one, minus = (
        ("0x43004300", "0x3F803F80", "0xC308C308")
        if dtype == torch.bfloat16
        else ("0x64006400", "0x3C003C00", "0xE408E408")
    )
    lines = [".reg .b32 negative_zero, r, one, zero;", "mov.b32 negative_zero, 0x80008000;"]
    lines += [f"mov.b32 one, {one};", f"mov.b32 zero, {'$11' if zeros else minus};"]
    for word in range(2):
        for i in range(4):
            out = f"${word * 4 + i}"
            lines += [
                f"shr.u32 r, ${8 + word}, {4 * i};",
                f"lop3.b32 r, r, 0x000F000F, {bits}, 0xEA;",
                f"fma.rn.{suffix} r, r, one, zero;",
                f"fma.rn.{suffix} {out}, r, $10, negative_zero;",
            ]
    return lines


@cache
def table(kind: str, dtype: torch.dtype) -> Tensor:
    """int32 [8]: the low bytes of the 16 values of "nf4" or "fp4" in `dtype`, then the high bytes."""
    values: Tensor = functional.get_4bit_type(kind, device="cpu")
    raw = values.to(dtype).view(torch.uint8).view(16, 2)
    return raw.T.contiguous().view(-1).view(torch.int32)
