"""A store's sizes, as the planner wants them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig

from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.runtime.expert_extents import split_block
from headrace.runtime.kv.store import page_nbytes, plain_format
from headrace.runtime.manifest import Block, LayerShape
from headrace.runtime.names import experts_per_token
from headrace.runtime.rope import context_limit
from headrace.runtime.skeleton import parse_config
from headrace.scheduler.inputs import Experts, ModelShape
from headrace.scheduler.kv_format import KVFormat

ROUTED_EXPERT = re.compile(r"\.experts\.\d+\.")

SCRATCH_BYTES = 512 << 20
"""Scratch is one dequantized matrix, but no more than this; larger ones are multiplied in slices."""


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


def model_shape(store: Described, dtype: torch.dtype, fmt: KVFormat | None = None) -> ModelShape:
    """What running `store` with compute type `dtype` takes; `fmt` of KV pages is that, if not given.

    UnsupportedModelError when `fmt` cannot hold the model's keys and values.
    """
    own = plain_format(dtype)
    fmt = fmt or own
    tails = store.layer_shapes if fmt.is_quantized else ()
    config = parse_config(store.config, str(store.path / "config.json"))
    largest = scratch_elements(store.layers, dtype)
    tied = store.embed.nbytes if store.tied else 0
    return ModelShape(
        layer_bytes=tuple(block.nbytes for block in store.layers),
        layer_kv_bytes=tuple(page_nbytes(shape, fmt) for shape in store.layer_shapes),
        layer_parameters=tuple(shape.parameters for shape in store.layer_shapes),
        layer_active_parameters=tuple(shape.active_parameters for shape in store.layer_shapes),
        largest_matrix=largest,
        embed_bytes=_table_bytes(store.embed, dtype),
        head_bytes=store.head.nbytes + tied,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        intermediate_size=_intermediate_size(config),
        max_context=_max_context(config),
        compute_bytes=dtype.itemsize,
        needs_scratch=largest > 0,
        experts=tuple(_experts(block, experts_per_token(config)) for block in store.layers),
        layer_tail_bytes=tuple(page_nbytes(shape, own) for shape in tails),
        kv_format=fmt.name,
        attention_size=_attention_size(config, store.layer_shapes, fmt),
        tied_bytes=0 if _is_packed(store.embed) else tied,
        layer_adapter_columns=tuple(map(_adapter_columns, store.layers)),
    )


def _is_packed(embed: Block) -> bool:
    return any(spec.format != "raw" for spec in embed.weights.values())


def _table_bytes(embed: Block, dtype: torch.dtype) -> int:
    """Of host memory: a quantized table is dequantized when it is loaded."""
    if not _is_packed(embed):
        return embed.nbytes
    return dtype.itemsize * sum(prod(spec.shape) for spec in embed.weights.values())


def scratch_elements(
    layers: Iterable[Block], dtype: torch.dtype, cap_bytes: int = SCRATCH_BYTES
) -> int:
    """Elements of the largest matrix that has to be dequantized (an expert counts alone), capped.

    Only layers count: the head, which may be far larger, is multiplied in slices of as much.
    """
    sizes = [
        prod(spec.shape[-2:])
        for block in layers
        for spec in block.weights.values()
        if len(spec.shape) >= 2
        and (spec.format != "raw" or TORCH_DTYPES[spec.parts["data"].dtype] != dtype)
    ]
    return min(max(sizes, default=0), cap_bytes // dtype.itemsize)


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


def _attention_size(config: PretrainedConfig, shapes: Iterable[LayerShape], fmt: KVFormat) -> int:
    """Columns of one token in attention to latents: all heads' queries, rotated once more where keys
    are, and results."""
    copies = 2 if fmt.is_rotated else 1
    widths = (copies * (s.k_dim + s.v_dim) + s.v_dim for s in shapes if s.latent)
    return int(config.num_attention_heads) * max(widths, default=0)


def _max_context(config: PretrainedConfig) -> int:
    """What the model was made for, and no further than where its rotary embedding starts to depend
    on the other sequences of a call."""
    limits = (getattr(config, "max_position_embeddings", None), context_limit(config))
    return min((limit for limit in limits if limit), default=1 << 20)


def _intermediate_size(config: PretrainedConfig) -> int:
    """MLP columns of one token: its experts' together where there are any."""
    top_k = experts_per_token(config)
    dense = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    expert = getattr(config, "moe_intermediate_size", None)
    if isinstance(expert, int):
        return max(int(dense), expert * top_k)
    return int(dense) * top_k
