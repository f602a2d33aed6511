"""The PTX that decodes 4-bit codes, carried out instruction by instruction on the host."""

import random

import pytest
import torch
from bitsandbytes.functional import get_4bit_type

from headrace.runtime.matmul.decode_4bit import decoding, magic

MASK = 0xFFFFFFFF


def pair(values: torch.Tensor) -> int:
    """Two 16-bit floats as a register, the first in its low half."""
    return int(values.view(torch.int32).item()) & MASK


def unpair(register: int, dtype: torch.dtype) -> torch.Tensor:
    signed = register - (1 << 32) if register >> 31 else register
    return torch.tensor([signed], dtype=torch.int32).view(dtype)


def prmt(a: int, b: int, selector: int) -> int:
    sources = [(word >> shift) & 255 for word in (a, b) for shift in (0, 8, 16, 24)]
    out = 0
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = sources[nibble & 7]
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        out |= byte << (8 * i)
    return out


def lop3(a: int, b: int, c: int, table: int) -> int:
    out = 0
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & MASK


def execute(asm: str, registers: dict[str, int], dtype: torch.dtype) -> None:
    for line in asm.splitlines():
        if line in "{}" or line.startswith(".reg"):
            continue
        operation, _, rest = line.rstrip(";").partition(" ")
        to, *names = rest.split(", ")
        a = [registers[n] if n in registers else int(n, 0) for n in names]
        if operation.startswith("fma"):
            x, y, z = (unpair(value, dtype).double() for value in a)
            registers[to] = pair((x * y + z).to(dtype))
        else:
            registers[to] = {
                "mov.b32": lambda a: a[0],
                "and.b32": lambda a: a[0] & a[1],
                "shl.b32": lambda a: a[0] << a[1] & MASK,
                "shr.u32": lambda a: a[0] >> a[1],
                "prmt.b32": lambda a: prmt(*a),
                "lop3.b32": lambda a: lop3(*a),
            }[operation](a)


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
                values = get_4bit_type(kind, device="cpu").to(dtype)[picked]
            got = unpair(registers[f"${plane}"], dtype)
            assert torch.equal(got, (values.double() * scale.double()).to(dtype)), (plane, codes)
