"""Codes of quantized pages to 16-bit floats in registers: the PTX that the attention kernels inline.

A piece takes a register of two words of 16 bits, and leaves a register for each part (attention_codes):
two codes as floats. These are put together, not converted, which GPUs do at a quarter of the rate: a
code's bits are the last ones of a float, from which 2^n is subtracted, with nothing rounded.
"""

from functools import cache

import torch


@cache
def unpacking(bits: int, dtype: torch.dtype) -> tuple[str, str] | None:
    """PTX and its constraints for codes of `bits`; $0 and on are parts, and the last one is the words.

    None where numbers are not of 16 bits.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    lines = (_bfloat16 if dtype == torch.bfloat16 else _float16)(bits)
    constraints = ",".join(["=&r"] * (16 // bits) + ["r"])
    return "\n".join(("{", ".reg .b32 r, s, one, less;", *lines, "}")), constraints


def _bfloat16(bits: int) -> list[str]:
    """0x4300 is 128, and holds seven bits more.

    int8: 128 + seven bits, less 128 or 256, which differ by what is the sign of a code: 1.75
    operations a number. int4: 1.4.
    """
    parts = 16 // bits
    lines = ["mov.b32 one, 0x3F803F80;", "mov.b32 less, 0xC300C300;"]
    for part in range(parts):
        lines.append(f"shr.u32 r, ${parts}, {bits * part};")
        if bits == 8:
            lines.append("lop3.b32 s, r, 0x00800080, less, 0xEA;")
        lines.append(
            f"lop3.b32 r, r, {'0x007F007F' if bits == 8 else '0x000F000F'}, 0x43004300, 0xEA;"
        )
        lines.append(f"fma.rn.bf16x2 ${part}, r, one, {'s' if bits == 8 else 'less'};")
    return lines


def _float16(bits: int) -> list[str]:
    """0x6400 is 1024, and holds ten bits more.

    int8: 128 more than a code, whose sign is turned around. int4: codes in bits 4 to 7 count 16 times.
    """
    parts = 16 // bits
    lines = []
    for part in range(parts):
        if bits == 8:
            merged, unit, less = "0x00FF00FF, 0x64806480, 0x6A", "0x3C003C00", "0xE480E480"
        elif part % 2 == 0:
            merged, unit, less = "0x000F000F, 0x64006400, 0xEA", "0x3C003C00", "0xE400E400"
        else:
            merged, unit, less = "0x00F000F0, 0x64006400, 0xEA", "0x2C002C00", "0xD400D400"
        lines += [
            f"shr.u32 r, ${parts}, {part * bits // 8 * 8};",
            f"lop3.b32 r, r, {merged};",
            f"mov.b32 one, {unit};",
            f"mov.b32 less, {less};",
            f"fma.rn.f16x2 ${part}, r, one, less;",
        ]
    return lines
