"""Device memory that timing products takes; apart from what times them, which takes long to import."""

import torch

FLUSH_BYTES = 256 << 20
"""What is written between two products; more than any device caches."""


def tuning_bytes(layer_bytes: int, parameters: int, dtype: torch.dtype) -> int:
    """Device memory that suffices to tune a layer's products, each of some of its weights."""
    return layer_bytes + parameters * dtype.itemsize + FLUSH_BYTES
