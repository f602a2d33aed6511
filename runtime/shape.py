"""A store's sizes, as the planner wants them. Neither torch nor transformers is imported: drivers need no more."""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

from headrace.runtime.expert_extents import split_block
from headrace.runtime.manifest import Block, LayerShape, ModelSettings
from headrace.scheduler.inputs import Experts, ModelShape
from headrace.scheduler.kv_format import FORMATS, PLAIN, KVFormat

ROUTED_EXPERT = re.compile(r"\.experts\.\d+\.")

SCRATCH_BYTES = 512 << 20
"""Scratch is one dequantized matrix, but no more than this; larger ones are multiplied in slices."""


_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # safetensors' names


class Described(Protocol):
    """What sizes are taken from: a Store, or a checkpoint seen as one."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def embed(self) -> Block: ...

    @property
    def layers(self) -> Sequence[Block]: ...

    @property
    def head(self) -> Block: ...

    @property
    def layer_shapes(self) -> Sequence[LayerShape]: ...

    @property
    def tied(self) -> bool: ...

    @property
    def settings(self) -> ModelSettings | None: ...


def model_shape(store: Described, dtype: str, fmt: KVFormat | None = None) -> ModelShape:
    """What running `store` with the compute type of that name takes; `fmt` of KV pages is that, if not given.

    UnsupportedModelError when `fmt` cannot hold the model's keys and values.
    """
    own = FORMATS[PLAIN[dtype]]
    fmt = fmt or own
    tails = store.layer_shapes if fmt.is_quantized else ()
    settings = store.settings or _read_settings(store)
    compute_bytes = own.bits // 8
    largest = scratch_elements(store.layers, dtype)
    tied = store.embed.nbytes if store.tied else 0
    return ModelShape(
        layer_bytes=tuple(block.nbytes for block in store.layers),
        layer_kv_bytes=tuple(shape.page_bytes(fmt) for shape in store.layer_shapes),
        layer_parameters=tuple(shape.parameters for shape in store.layer_shapes),
        layer_active_parameters=tuple(shape.active_parameters for shape in store.layer_shapes),
        largest_matrix=largest,
        embed_bytes=_table_bytes(store.embed, compute_bytes),
        head_bytes=store.head.nbytes + tied,
        hidden_size=settings.hidden_size,
        vocab_size=settings.vocab_size,
        intermediate_size=settings.intermediate_size,
        max_context=settings.max_context,
        compute_bytes=compute_bytes,
        needs_scratch=largest > 0,
        experts=tuple(_experts(block, settings.experts_per_token) for block in store.layers),
        layer_tail_bytes=tuple(shape.page_bytes(own) for shape in tails),
        kv_format=fmt.name,
        attention_size=_attention_size(settings.attention_heads, store.layer_shapes, fmt),
        tied_bytes=0 if _is_packed(store.embed) else tied,
        layer_adapter_columns=tuple(map(_adapter_columns, store.layers)),
    )


def _read_settings(store: Described) -> ModelSettings:
    """Of a store that was made before manifests had them. Takes seconds, to import."""
    from headrace.runtime.settings import model_settings
    from headrace.runtime.skeleton import parse_config

    return model_settings(parse_config(store.config, str(store.path / "config.json")))


def _is_packed(embed: Block) -> bool:
    return any(spec.format != "raw" for spec in embed.weights.values())


def _table_bytes(embed: Block, compute_bytes: int) -> int:
    """Of host memory: a quantized table is dequantized when it is loaded."""
    if not _is_packed(embed):
        return embed.nbytes
    return compute_bytes * sum(prod(spec.shape) for spec in embed.weights.values())


def scratch_elements(layers: Iterable[Block], dtype: str, cap_bytes: int = SCRATCH_BYTES) -> int:
    """Elements of the largest matrix that has to be dequantized (an expert counts alone), capped.

    Only layers count: the head, which may be far larger, is multiplied in slices of as much.
    """
    own = _STORED[dtype]
    sizes = [
        prod(spec.shape[-2:])
        for block in layers
        for spec in block.weights.values()
        if len(spec.shape) >= 2 and (spec.format != "raw" or spec.parts["data"].dtype != own)
    ]
    return min(max(sizes, default=0), cap_bytes * 8 // FORMATS[PLAIN[dtype]].bits)


def _adapter_columns(block: Block) -> int:
    """Rows and columns of the layer's matrices, but for routed experts': no adapter changes those."""
    return sum(
        sum(spec.shape)
        for name, spec in block.weights.items()
        if len(spec.shape) == 2 and not ROUTED_EXPERT.search(name)
    )


def _experts(block: Block, per_token: int) -> Experts | None:
    """The layer's routed experts, if each can be read alone."""
    parts = split_block(block)
    if parts is None:
        return None
    return Experts(
        count=len(parts.experts),
        per_token=min(per_token, len(parts.experts)),
        dense_bytes=parts.dense.nbytes,
        expert_bytes=max(extent.nbytes for extent in parts.experts),
    )


def _attention_size(heads: int, shapes: Iterable[LayerShape], fmt: KVFormat) -> int:
    """Columns of one token in attention to latents: all heads' queries, rotated once more where keys
    are, and results."""
    copies = 2 if fmt.is_rotated else 1
    widths = (copies * (s.k_dim + s.v_dim) + s.v_dim for s in shapes if s.latent)
    return heads * max(widths, default=0)
