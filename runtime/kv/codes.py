"""Numbers of a key or a value as codes of 8 or 4 bits, and back: the pages of quantized formats.

int8: code * step, codes -127 .. 127, step = largest / 127.
int4: code * step + lowest, codes 0 .. 15, two in a byte: the first half of the numbers in the low
bits, the second half in the high ones. Keys are rotated before (Rotation), which spreads what is
large in a few of their numbers over all of them. Values are not, for it was measured to change
nothing (docs/benchmarks.md), unless they are parts of keys (latents.py).

Steps and lowest numbers are float16, and codes are the nearest for the steps as they are stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.runtime.product import product
from headrace.scheduler.kv_format import KVFormat, rotated


def quantize(x: Tensor, fmt: KVFormat) -> tuple[Tensor, Tensor]:
    """[..., dim] to codes [..., code bytes], int8 or uint8, and scales [..., fmt.scales] float16."""
    x = x.float()
    if fmt.bits == 8:
        step = (x.abs().amax(-1, keepdim=True) / 127).half()
        return _nearest(x, step).clamp(-127, 127).to(torch.int8), step
    lowest = x.amin(-1, keepdim=True).half()
    x = x - lowest.float()
    step = (x.amax(-1, keepdim=True) / 15).half()
    low, high = _nearest(x, step).clamp(0, 15).to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4, torch.cat([step, lowest], dim=-1)


def _nearest(x: Tensor, step: Tensor) -> Tensor:
    """Multiples of `step`; of a step that is too small for float16, none."""
    return torch.floor(x / torch.where(step == 0, 1, step.float()) + 0.5)


def dequantize(codes: Tensor, scales: Tensor, fmt: KVFormat) -> Tensor:
    """What `quantize` made, as [..., dim] float32."""
    step = scales[..., :1].float()
    if fmt.bits == 8:
        return codes.float().mul_(step)
    both = torch.cat([codes & 15, codes >> 4], dim=-1)
    return both.float().mul_(step).add_(scales[..., 1:].float())


@dataclass(frozen=True, slots=True)
class Rotation:
    """Hadamard's, which leaves products of keys and queries as they are: k `into` . q `back` = k . q.

    Numbers are mixed in blocks of the largest power of two, 2^n, that divides `dim`. Entries are
    powers of two, 2^-floor(n/2) and 2^-ceil(n/2), so that they are exact in every type.
    """

    into: Tensor
    back: Tensor

    @classmethod
    def of(cls, dim: int, dtype: torch.dtype, device: torch.device) -> "Rotation":
        block = torch.ones(1, 1)
        while len(block) < rotated(dim):
            block = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), block)
        whole = torch.block_diag(*[block] * (dim // len(block))).to(device, dtype)
        power = len(block).bit_length() - 1
        return cls(whole * 0.5 ** (power // 2), whole * 0.5 ** (power - power // 2))

    def keys(self, k: Tensor) -> Tensor:
        """k [..., dim] rotated. A row's bits are its own (see product)."""
        return product(k, self.into)

    def queries(self, q: Tensor) -> Tensor:
        return product(q, self.back)

    def restored(self, k: Tensor) -> Tensor:
        """What `keys` made, as it was: Hadamard's matrix is symmetric, and but for its size its own
        inverse."""
        return product(k, self.back)
