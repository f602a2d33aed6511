"""What the manifest of a store (store.py) says: blocks, the weights in them, layers' shapes, and the model's settings."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.scheduler.kv_format import KVFormat

MANIFEST = "headrace.json"
VERSION = 1

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
    format "int4": parts {"data": U8 packed, even element in the high nibble; "scale": F16, BF16 or
        F32 [rows, columns / blocksize]} and either "zero": U8 of scale's shape (8 everywhere when
        absent), weight = (data - zero) * scale, or "offset" of scale's type and shape,
        weight = data * scale + offset. With "block_scale": F16 [rows, columns / 256], scale is U8 or I8 and is
        multiplied by that of its columns, and so is offset by "block_offset". Optional "order": I32 [columns], of a single matrix:
        column j of the data is column order[j] of the weight.
    format "int3": the same with data U8 [rows, 3 ceil(columns / 8)], eight codes in three bytes (conversion/affine.py), and
        always "zero".
    format "int8g": parts {"data": I8 [rows, columns], "scale", optional "offset" and those of blocks} as in int4,
        weight = data * scale + offset.
    format "fp8": parts {"data": F8_E4M3 [rows, columns], "scale": F32 [matrices x blocks of rows,
        blocks of columns]}, weight = data * scale; blocks are of `block_rows` rows of a matrix and
        `blocksize` columns, the last ones may be smaller. `fp8_rows`: it was made to be multiplied by
        rows that are rounded to fp8, too.
    format "mxfp4": parts {"data": U8 packed as in int4, of e2m1 codes; "scale": U8 [rows, columns / 32]
        (E8M0)}, weight = e2m1[data] * 2 ** (scale - 127).
    format "nvfp4": parts {"data" as in mxfp4; "scale": F8_E4M3 [rows, columns / 16]; "row_scale": F32 [rows, 1]},
        weight = e2m1[data] * (scale * row_scale).
    rows are those of all matrices of a stack, one after another; `blocksize` divides columns but in fp8.
    `shape` is the logical weight's. `turned`: parts are those of the stack whose matrices are
    transposed, [experts, columns, rows].
    """

    format: str
    shape: tuple[int, ...]
    parts: dict[str, TensorSpec]
    blocksize: int = 0
    nested_blocksize: int = 0
    nested_offset: float = 0.0
    block_rows: int = 0
    turned: bool = False
    fp8_rows: bool = False


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
    `latent`: a key is its value, and after it the k_dim numbers that are kept as keys (latents.py).
    """

    kv_heads: int
    k_dim: int
    v_dim: int
    parameters: int
    active_parameters: int
    largest_matrix: int
    latent: bool = False

    def page_bytes(self, fmt: KVFormat) -> int:
        """Bytes of one page of the layer, and of one tail in the compute type's format."""
        return fmt.page_bytes(self.kv_heads, self.k_dim, self.v_dim, latent=self.latent)


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What the planner needs to know of the whole model. It is in the manifest because only transformers can
    tell it from a config.json, which takes seconds to import.

    `max_context` is in tokens, `intermediate_size` in columns of all the experts' that one token visits together.
    """

    hidden_size: int
    vocab_size: int
    intermediate_size: int
    attention_heads: int
    experts_per_token: int
    max_context: int


def block_to_json(block: Block, header_hash: str) -> dict[str, Any]:
    """The manifest's entry of a block. Every part is [dtype, shape, offset, nbytes]."""
    return {
        "name": block.name,
        "file": block.file.name,
        "data_offset": block.data_offset,
        "nbytes": block.nbytes,
        "xxh3_64": block.xxh3_64,
        "header": header_hash,
        "weights": {name: _weight_to_json(spec) for name, spec in block.weights.items()},
    }


def _weight_to_json(spec: WeightSpec) -> dict[str, Any]:
    entry = asdict(spec)
    entry["parts"] = {
        role: [part.dtype, part.shape, part.offset, part.nbytes]
        for role, part in spec.parts.items()
    }
    return entry


def block_from_json(path: Path, entry: dict[str, Any]) -> Block:
    return Block(
        name=entry["name"],
        file=path / entry["file"],
        data_offset=entry["data_offset"],
        nbytes=entry["nbytes"],
        xxh3_64=entry["xxh3_64"],
        weights={name: _weight_from_json(spec) for name, spec in entry["weights"].items()},
    )


def _weight_from_json(entry: dict[str, Any]) -> WeightSpec:
    parts = {
        role: TensorSpec(dtype, tuple(shape), offset, nbytes)
        for role, (dtype, shape, offset, nbytes) in entry["parts"].items()
    }
    return WeightSpec(**{**entry, "shape": tuple(entry["shape"]), "parts": parts})
