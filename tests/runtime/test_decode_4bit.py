"""The PTX that decodes 4-bit codes, carried out instruction by instruction on the host."""

import random

import pytest
import torch
from ptx import execute, pair, unpair

from headrace.runtime.bnb import functional
from headrace.runtime.matmul.decode_4bit import decoding, magic


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "zeros"), [("nf4", 0), ("fp4", 0), ("int4", 0), ("int4", 1)])
def test_two_words(kind: str, zeros: int, dtype: torch.dtype) -> None:
    """Plane p holds, of the words' sixteen k, the two that the activations' order puts there."""
    draw = random.Random(0)
    how = decoding(kind, dtype, bool(zeros))
    for _ in range(50):
        words = [draw.getrandbits(32) for _ in range(2)]
        scale = torch.tensor([draw.uniform(0.01, 2)] * 2).to(dtype)
        zero = draw.randrange(17) if zeros else 8
        minus = torch.tensor([-(magic(dtype) + zero)] * 2).to(dtype)
        registers = {"$8": words[0], "$9": words[1], "$10": pair(scale), "$11": pair(minus)}
        execute(how.asm, registers, dtype)
        # Byte i of a word holds k = 2 i in its high nibble and 2 i + 1 in its low one.
        codes = [
            word >> (8 * (k // 2) + (0 if k % 2 else 4)) & 15 for word in words for k in range(8)
        ]
        for plane in range(8):
            i, first = plane % 4, 8 * (plane // 4)
            places = (i ^ 1, 4 + (i ^ 1)) if how.affine else (2 * i, 2 * i + 1)
            picked = torch.tensor([codes[first + place] for place in places])
            if how.affine:
                values = (picked - zero).to(dtype)
            else:
                values = functional.get_4bit_type(kind, device="cpu").to(dtype)[picked]
            got = unpair(registers[f"${plane}"], dtype)
            assert torch.equal(got, (values.double() * scale.double()).to(dtype)), (plane, codes)
