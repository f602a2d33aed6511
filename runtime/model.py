"""One stage's share of the model: transformers' own layers, run one at a time on packed rows."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headrace.runtime import plugs, rope
from headrace.runtime.attention import paged_attention
from headrace.runtime.batch import Batch
from headrace.runtime.binding import Binder
from headrace.runtime.kv_store import KVStore
from headrace.runtime.linear import RawWeight, Scratch, Weight
from headrace.runtime.matmul_tuning import problems, tune
from headrace.runtime.quantize import TORCH_DTYPES
from headrace.runtime.skeleton import BlockKey, Skeleton, parse_config
from headrace.runtime.store import Block, WeightSpec

SCRATCH_BYTES = 512 << 20
"""Scratch is one dequantized matrix, but no more than this; larger ones are multiplied in slices."""


class Source(Protocol):
    """Where weights are described and the small blocks are read: a Store, or a fake of one."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def embed(self) -> Block: ...

    @property
    def layers(self) -> Sequence[Block]: ...

    @property
    def head(self) -> Block: ...

    def read_block(self, block: Block) -> bytearray: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A micro-batch ready to run: its metadata, and what each layer is given beside its input."""

    batch: Batch
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


class StageModel:
    """The layers of one stage, and what lies before and after all layers where it is asked for.

    Layer weights live in buffers that others own, and `bind` points a layer at one.
    With `with_embedding` the embedding table is held in host memory; with `with_head` the final norm
    and the head are held on the device. Methods run on the current stream.
    """

    def __init__(
        self,
        store: Source,
        layers: Sequence[int],
        *,
        device: torch.device,
        dtype: torch.dtype,
        with_embedding: bool,
        with_head: bool,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self._skeleton = Skeleton(parse_config(store.config, "the store's config.json"), dtype)
        self.config = self._skeleton.config
        self.hidden_size: int = self.config.hidden_size
        self._modules = self._skeleton.layers
        _move_buffers(self._skeleton.model, device)
        weights = _weights(store, layers)
        blocks = [store.layers[layer] for layer in layers]
        if device.type == "cuda":
            tune(device, problems(_four_bit(blocks), dtype))
        self._scratch = Scratch(scratch_elements(blocks, dtype), dtype, device)
        binder = Binder(self._skeleton, weights, self._scratch)
        self._bindings = {i: binder.bindings(i) for i in weights if isinstance(i, int)}
        self._attentions = {i: plugs.attention_modules(self._modules[i]) for i in self._bindings}
        self._bound: dict[int, Tensor] = {}
        self._blank = torch.zeros(1, self.hidden_size, dtype=dtype, device=device)
        self._table: Tensor | None = None
        self._with_head = with_head
        if with_embedding or len(store.embed.weights) > 1 or (with_head and self._skeleton.tied):
            self._load_embedding(store, binder, with_embedding, with_head)
        if with_head:
            data = _read(store, store.head).to(device)
            for binding in binder.bindings("head"):
                binding.bind(data)

    @property
    def context_limit(self) -> int | None:
        """Longest context that gives the reference's results, where the rotation sets a limit."""
        return rope.context_limit(self.config)

    def _load_embedding(
        self, store: Source, binder: Binder, with_table: bool, with_head: bool
    ) -> None:
        data, spec = _read(store, store.embed), binder.table()
        if with_table:
            # A view of the bytes read, unless the table is quantized.
            weight = Weight.view(spec, data)
            raw = isinstance(weight, RawWeight)
            self._table = weight.dense(weight.dtype if raw else self.dtype)
        others = binder.bindings("embed")
        tied = with_head and self._skeleton.tied
        if others or tied:
            on_device = data.to(self.device)
            for binding in others:
                binding.bind(on_device)
            if tied:
                path = self._skeleton.head_name.removesuffix(".weight")
                binder.packed(path, spec).bind(on_device)

    def bind(self, layer: int, block: Tensor) -> None:
        """Points the layer's weights at `block`, its data section on the device (uint8).

        The caller orders the block's arrival before the layer's use. Binding a layer again to where
        it already is costs nothing.
        """
        bound = self._bound.get(layer)
        if bound is not None and bound.data_ptr() == block.data_ptr():
            return
        for binding in self._bindings[layer]:
            binding.bind(block)
        self._bound[layer] = block

    def prepare(self, batch: Batch) -> Prepared:
        """What the layers need to run this micro-batch; the same for every layer and visit."""
        rows = self._blank.expand(len(batch.positions), -1)
        _, calls = self._skeleton.enter(rows, batch.positions)
        return Prepared(batch, calls)

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [T], on the host -> hidden states [T, hidden] on the device."""
        assert self._table is not None, "this stage does not embed"
        # A copy from pageable memory would wait for all compute queued before it.
        shape, pinned = (len(token_ids), self._table.shape[1]), self.device.type == "cuda"
        rows = torch.empty(shape, dtype=self._table.dtype, pin_memory=pinned)
        torch.index_select(self._table, 0, token_ids, out=rows)
        rows = rows.to(self.device, non_blocking=True).to(self.dtype)
        positions = torch.zeros(len(token_ids), dtype=torch.int64, device=self.device)
        return self._skeleton.enter(rows, positions)[0]

    def run_layer(self, layer: int, x: Tensor, prepared: Prepared, kv: KVStore) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes the batch's keys and values to the layer's pages."""
        args, kwargs = prepared.calls[layer]
        attend = partial(paged_attention, kv=kv.layer(layer), batch=prepared.batch)
        with plugs.attending(self._attentions[layer], attend):
            out = self._modules[layer](x[None], *args, **kwargs)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden[0]

    def logits(self, x: Tensor) -> Tensor:
        """x [R, hidden], the last layer's output -> [R, vocabulary] float32."""
        assert self._with_head, "this stage has no head"
        return self._skeleton.leave(x)


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


def _four_bit(layers: Iterable[Block]) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Format, block size and shape of each 4-bit matrix or stack of them."""
    for block in layers:
        for spec in block.weights.values():
            if spec.format in ("nf4", "fp4") and len(spec.shape) >= 2:
                yield spec.format, spec.blocksize, spec.shape


def _weights(store: Source, layers: Iterable[int]) -> dict[BlockKey, Mapping[str, WeightSpec]]:
    weights: dict[BlockKey, Mapping[str, WeightSpec]] = {
        layer: store.layers[layer].weights for layer in layers
    }
    return weights | {"embed": store.embed.weights, "head": store.head.weights}


def _read(store: Source, block: Block) -> Tensor:
    return torch.frombuffer(store.read_block(block), dtype=torch.uint8)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
