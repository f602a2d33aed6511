"""PTX of a few instructions, carried out one by one on the host."""

import torch

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
