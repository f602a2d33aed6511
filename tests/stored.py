"""Stores of tiny models, and what a store's bytes mean, read by the reference decoder."""

from pathlib import Path

import torch
from architectures import tiny_model

from headrace.runtime.conversion.convert import convert
from headrace.runtime.conversion.quantize import STORE_DTYPES, TORCH_DTYPES, decode
from headrace.runtime.manifest import Block, TensorSpec
from headrace.runtime.store import Store


def packed_block(parts: dict[str, torch.Tensor]) -> tuple[dict[str, TensorSpec], torch.Tensor]:
    """Tensors one after another on 256-byte boundaries, as in a block, after something else."""
    specs, data = {}, bytearray(256)
    for name, tensor in parts.items():
        specs[name] = TensorSpec(
            STORE_DTYPES[tensor.dtype], tuple(tensor.shape), len(data), tensor.nbytes
        )
        data += tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        data += bytes(-len(data) % 256)
    return specs, torch.frombuffer(data, dtype=torch.uint8)


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


def tiny_store(name: str, folder: Path) -> Path:
    """A store of a tiny model of an architecture, as it is."""
    tiny_model(name).save_pretrained(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "store", format="keep", allow_missing_tokenizer=True)
    return folder / "store"
