"""Whether two results are the same bit for bit, where a CPU gives that."""

import torch
from torch import Tensor

EXACT = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""With AVX2 alone, a product of one or two rows is summed in another order."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Elsewhere: the same but for what the order of a sum may change."""
    return torch.equal(a, b) or (not EXACT and torch.allclose(a, b, rtol=1e-4, atol=1e-4))
