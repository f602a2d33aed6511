"""The PTX that takes words of codes apart, carried out instruction by instruction on the host."""

import pytest
import torch
from ptx import execute, unpair

from headrace.runtime.attention.code_words import unpacking


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_code(bits: int, dtype: torch.dtype) -> None:
    """In each place of a word, beside all sorts of others."""
    found = unpacking(bits, dtype)
    assert found is not None
    asm, constraints = found
    parts = 16 // bits
    assert constraints.split(",") == ["=&r"] * parts + ["r"]
    for first in range(1 << 10):
        one = first * 0x6D55 & 0xFFFF
        two = one * 0x9E37 + 0x1234 & 0xFFFF
        registers = {f"${parts}": one | two << 16}
        execute(asm, registers, dtype)
        for part in range(parts):
            codes = [word >> bits * part & (1 << bits) - 1 for word in (one, two)]
            if bits == 8:
                codes = [code - 256 if code >= 128 else code for code in codes]
            assert unpair(registers[f"${part}"], dtype).tolist() == codes


def test_no_ptx_for_float32() -> None:
    assert unpacking(8, torch.float32) is None
