"""Whether two results are the same bit for bit, where a CPU gives that."""

import torch
from torch import Tensor

from headrace.runtime.product import least_rows

EXACT = torch.backends.cpu.get_cpu_capability() == "AVX512" and least_rows() == 1
"""With AVX2 alone, and by MKL on AMD's CPUs, a product of few rows is summed in another order."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Elsewhere: the same but for what the order of a sum may change."""
    return torch.equal(a, b) or (not EXACT and torch.allclose(a, b, rtol=1e-4, atol=1e-4))
