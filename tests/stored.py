"""What a store's bytes mean, read by the reference decoder."""

import torch

from headrace.runtime.conversion.quantize import TORCH_DTYPES, decode
from headrace.runtime.store import Block, Store


def stored_weights(store: Store, block: Block) -> dict[str, torch.Tensor]:
    """Every weight of a block by name, in float32."""
    data = torch.frombuffer(store.read_block(block), dtype=torch.uint8)
    weights = {}
    for name, spec in block.weights.items():
        parts = {
            role: data[part.offset : part.offset + part.nbytes]
            .view(TORCH_DTYPES[part.dtype])
            .reshape(part.shape)
            for role, part in spec.parts.items()
        }
        weights[name] = decode(spec, parts, torch.float32)
    return weights
