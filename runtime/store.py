"""The on-disk checkpoint, laid out so that one layer is one aligned read into one slot.

A store is a directory that any safetensors reader opens:

    config.json, tokenizer files, generation_config.json   copied or extended from the checkpoint
    model.safetensors.index.json                           where transformers finds each tensor
    embed.safetensors, layer-00000.safetensors, ..., head.safetensors
    headrace.json                                          the manifest; written last, atomically

Each .safetensors file is a *block*: its JSON header is padded with spaces so that the data section
starts on a 4096-byte boundary, tensors lie in consumption order, each on a 256-byte boundary (filled
with pad tensors), all tensors of one expert adjacent, and the file ends on a 4096-byte boundary.
So the data section is one O_DIRECT extent, and every tensor is a view of the slot it is read into.
A directory without headrace.json is not a store: nothing half-written ever looks complete.
"""

from dataclasses import dataclass
from pathlib import Path

ALIGN_TENSOR = 256
ALIGN_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's place in its block's data section. `dtype` is safetensors' name ("BF16", "U8", ...)."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One logical weight of the checkpoint and the tensors that encode it.

    format "raw":  parts {"data"}; any dtype.
    format "nf4" / "fp4" (bitsandbytes): parts {"data": U8 packed, even element in the high nibble;
        "absmax"; "code": F32[16]} with one scale per `blocksize` consecutive elements of the
        flattened weight; double-quantized: absmax is U8 and parts also has {"nested_absmax": F32,
        "nested_code": F32[256]}, `nested_blocksize` and `nested_offset`.
    format "int8" (bitsandbytes row-wise): parts {"data": I8 [rows, columns], "scale": F32[rows]},
        weight = data * scale / 127.
    `shape` is the logical weight's.
    """

    format: str
    shape: tuple[int, ...]
    parts: dict[str, TensorSpec]
    blocksize: int = 0
    nested_blocksize: int = 0
    nested_offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Block:
    """One file: `nbytes` bytes from `data_offset` on are its data section (both multiples of 4096)."""

    name: str
    file: Path
    data_offset: int
    nbytes: int
    xxh3_64: str
    weights: dict[str, WeightSpec]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What the planner and the KV store need to know of one decoder layer.

    Keys are [tokens, kv_heads, k_dim], values [tokens, kv_heads, v_dim]. `parameters` is the number of
    weights in matrices, `active_parameters` those used by one token (fewer in mixtures of experts).
    `largest_matrix` is the element count of the largest single matrix (an expert counts alone).
    """

    kv_heads: int
    k_dim: int
    v_dim: int
    parameters: int
    active_parameters: int
    largest_matrix: int
