"""One stage's share of the model: transformers' own layers, run one at a time on packed rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from headrace.runtime import plugs, rope
from headrace.runtime.adapters.matrices import RunningRows
from headrace.runtime.adapters.places import AdapterPlaces
from headrace.runtime.attention.paged import paged_attention
from headrace.runtime.batch import Batch
from headrace.runtime.binding import Binder, Binding, ExpertStack, FetchedStack, PackedLinear, View
from headrace.runtime.dtypes import name_of
from headrace.runtime.embedding import EmbeddingTable
from headrace.runtime.expert_extents import Extent
from headrace.runtime.experts import Fetch, SlotViews
from headrace.runtime.kv.store import LayerPages
from headrace.runtime.latents import keeps_latents
from headrace.runtime.linear import QuantLinear
from headrace.runtime.linear_group import four_bit_products, grouped
from headrace.runtime.manifest import Block, LayerShape, WeightSpec
from headrace.runtime.matmul.configs import Product
from headrace.runtime.matmul.packed_cpu import PackedLayout
from headrace.runtime.memory.held import Holding, named
from headrace.runtime.names import map_names
from headrace.runtime.norms import FusedNorms
from headrace.runtime.recording import Interruptions
from headrace.runtime.rotary import FusedRotary
from headrace.runtime.shape import scratch_elements
from headrace.runtime.skeleton import BlockKey, Skeleton, parse_config
from headrace.runtime.trace import NULL_TRACER, Tracer
from headrace.runtime.weights.plain import RawWeight
from headrace.runtime.weights.view import view_weight
from headrace.runtime.weights.weight import Scratch
from headrace.scheduler.errors import StoreError

ReadBlock = Callable[[Block, torch.device], Tensor]
"""The bytes of a block (uint8) on a device, when they are there; they are the caller's to keep."""


class Source(Protocol):
    """Where weights are described and the small blocks are read: a Store, or a fake of one."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def embed(self) -> Block: ...

    @property
    def layers(self) -> Sequence[Block]: ...

    @property
    def layer_shapes(self) -> Sequence[LayerShape]: ...

    @property
    def head(self) -> Block: ...

    def read_block(self, block: Block) -> bytearray: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A micro-batch ready to run: its metadata, the first layer's input [T, hidden] on the stage that
    embeds, and what each layer is given beside its input."""

    batch: Batch
    x: Tensor
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


class StageModel:
    """The layers of one stage, and what lies before and after all layers where it is asked for.

    Layer weights live in buffers that others own, and `bind` points a layer at one.
    With `with_embedding` the embedding table is held in host memory; with `with_head` the final norm
    and the head are held on the device; `read` gets their bytes, by default from the store. Without
    `fp8_products` weights in fp8 are dequantized also where the device multiplies them as they are.
    Methods run on the current stream.
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
        read: ReadBlock | None = None,
        tracer: Tracer = NULL_TRACER,
        fp8_products: bool = True,
    ) -> None:
        self.device, self.dtype, self.tracer = device, dtype, tracer
        self._skeleton = _skeleton(store, dtype)
        self.config = self._skeleton.config
        self.hidden_size: int = self.config.hidden_size
        self._modules = self._skeleton.layers
        shared = self._skeleton.shared_inputs()
        _move_buffers(self._skeleton.model, device)
        weights = _weights(store, layers, fp8_products)
        self._find_names = partial(
            map_names,
            self._skeleton.model,
            places=dict(self._skeleton.model.state_dict(keep_vars=True)),
        )
        self.adapted = RunningRows()
        blocks = [store.layers[layer] for layer in layers]
        self.interruptions = Interruptions()
        self._scratch = Scratch(scratch_elements(blocks, name_of(dtype)), dtype, device, tracer)
        # In float32 on CPUs every bit stays transformers' own.
        exact = device.type == "cpu" and dtype == torch.float32
        norms = None if exact else FusedNorms(dtype)
        binder = Binder(self._skeleton, weights, self._scratch, self.interruptions, norms)
        self._bindings = {i: binder.bindings(i) for i in weights if isinstance(i, int)}
        self._groups = {
            i: grouped(self._modules[i], shared[i], b) for i, b in self._bindings.items()
        }
        self._attentions = {i: plugs.attention_modules(self._modules[i]) for i in self._bindings}
        if device.type == "cuda":
            rotary = FusedRotary()
            for module in chain.from_iterable(self._attentions.values()):
                rotary.install(module)
        self._bound: dict[int, Tensor] = {}
        self._slot_views = SlotViews()
        self._blank = torch.zeros(1, self.hidden_size, dtype=dtype, device=device)
        self._table: EmbeddingTable | None = None
        self._with_head = with_head
        self._head: list[tuple[Binding, Tensor]] = []
        self._ends: list[Tensor] = []  # what lies before and after the layers, on the device
        read = read or partial(_read, store)
        if with_embedding or len(store.embed.weights) > 1 or (with_head and self._skeleton.tied):
            data = read(store.embed, torch.device("cpu"))
            self._load_embedding(data, binder, with_embedding, with_head)
        if with_head:
            data = read(store.head, device)
            self._ends.append(data)
            self._head += [(binding, data) for binding in binder.bindings("head")]
            self.bind_head_through(view_weight)

    @property
    def context_limit(self) -> int | None:
        """Longest context that gives the reference's results, where the rotation sets a limit."""
        return rope.context_limit(self.config)

    def _load_embedding(
        self, data: Tensor, binder: Binder, with_table: bool, with_head: bool
    ) -> None:
        spec = binder.table()
        if with_table:
            # A view of the bytes read, unless the table is quantized.
            weight = view_weight(spec, data)
            raw = isinstance(weight, RawWeight)
            table = weight.dense(weight.dtype if raw else self.dtype)
            self._table = EmbeddingTable(table, self.device, self.dtype)
        others = binder.bindings("embed")
        tied = with_head and self._skeleton.tied
        if others or tied:
            on_device = data.to(self.device)
            self._ends.append(on_device)
            for binding in others:
                binding.bind(on_device)
            if tied:
                path = self._skeleton.head_name.removesuffix(".weight")
                self._head.append((binder.packed(path, spec), on_device))

    def layer(self, index: int) -> nn.Module:
        """transformers' layer, whose linears are QuantLinear while it is one of this stage's."""
        return self._modules[index]

    def bind_through(self, layer: int, block: Tensor, view: View) -> None:
        """`bind`, with another view of the layer's weights; it lasts until the next call."""
        for group in self._groups[layer]:
            group.forget()
        for binding in self._bindings[layer]:
            binding.bind(block, view)
        self._bound.pop(layer, None)

    def bind_head_through(self, view: View) -> None:
        """`bind_through` for what lies behind the last layer."""
        for binding, block in self._head:
            binding.bind(block, view)

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

    def pack(self, layer: int, block: Tensor, layout: PackedLayout) -> None:
        """Binds the layer to `block` for good, its 4-bit matrices repacked where they lie."""
        assert layer not in self._bound
        for binding in self._bindings[layer]:
            for spec in filter(layout.takes, binding.factors):
                layout.pack(spec, block)
            binding.bind(block, layout.view if binding.factors else view_weight)
        self._bound[layer] = block

    def split(self, layer: int, extents: Sequence[Extent], fetch: Fetch) -> None:
        """From now on the layer is bound to blocks without experts; they come from `fetch`."""
        assert layer not in self._bound
        self._bindings[layer] = tuple(
            binding.fetched(extents, fetch, self._slot_views)
            if isinstance(binding, ExpertStack)
            else binding
            for binding in self._bindings[layer]
        )

    def prepare(self, batch: Batch) -> Prepared:
        """What the layers need to run this micro-batch; the same for every visit."""
        return self.enter(self.rows(batch), batch)

    def enter(self, rows: Tensor, batch: Batch) -> Prepared:
        """`prepare` with the tokens' `rows`."""
        return Prepared(batch, *self._skeleton.enter(rows, batch.positions))

    def rows(self, batch: Batch, onto: Tensor | None = None) -> Tensor:
        """The tokens' rows of the embedding table [T, hidden], or blank ones where there is none.

        They are written `onto` a tensor, if one is given.
        """
        if self._table is None:
            return self._blank.expand(len(batch.tokens), -1) if onto is None else onto
        return self._table.rows(batch.tokens, onto)

    def is_static(self, layer: int) -> bool:
        """Whether the layer reads its weights where they are bound."""
        return all(binding.is_static for binding in self._bindings[layer])

    def interrupts(self, layer: int) -> bool:
        """Whether the host has to know what the layer computed before it can queue the rest."""
        return any(isinstance(b, (ExpertStack, FetchedStack)) for b in self._bindings[layer])

    def run_layers(
        self, layers: Iterable[tuple[int, Tensor]], x: Tensor, prepared: Prepared, kv: LayerPages
    ) -> Tensor:
        """`run_layer` for consecutive layers, each bound to its bytes."""
        for layer, block in layers:
            self.bind(layer, block)
            x = self.run_layer(layer, x, prepared, kv)
        return x

    def run_layer(self, layer: int, x: Tensor, prepared: Prepared, kv: LayerPages) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes the batch's keys and values to the layer's pages."""
        args, kwargs = prepared.calls[layer]
        attend = partial(_attend, kv, layer, prepared.batch, self.tracer)
        batch = prepared.batch
        adapted = self.adapted.of(batch.adapters, len(batch.tokens))
        with plugs.attending(self._attentions[layer], attend), adapted:
            out = self._modules[layer](x[None], *args, **kwargs)
        for group in self._groups[layer]:
            group.forget()
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden[0]

    def adapter_places(self) -> AdapterPlaces:
        """The linear layers whose products an adapter may change."""
        bindings = chain.from_iterable(self._bindings.values())
        own = {b.module for b in bindings if isinstance(b, PackedLinear) and not b.whole}
        modules = self._skeleton.model.named_modules()
        linears = {path: m for path, m in modules if isinstance(m, QuantLinear) and m in own}
        return AdapterPlaces(self._find_names, self._skeleton.block_of, self._bindings, linears)

    def four_bit_products(self) -> set[Product]:
        """The layers' products with 4-bit weights."""
        return {
            found for bindings in self._bindings.values() for found in four_bit_products(bindings)
        }

    def memory(self) -> Iterator[Holding]:
        """What is held beside the layers' blocks."""
        if self._table is not None:
            yield from self._table.memory()
        yield from named("head", self._ends)
        yield from named("scratch", [self._scratch.memory])
        yield from named("buffers", [*self._skeleton.model.buffers(), self._blank])

    def close(self) -> None:
        """Unpin the embedding table, when the device has done with it. Safe to call twice."""
        if self._table is not None:
            self._table.close()

    def logits(self, x: Tensor) -> Tensor:
        """x [R, hidden], the last layer's output -> [R, vocabulary] float32."""
        assert self._with_head, "this stage has no head"
        return self._skeleton.leave(x)


def _attend(
    kv: LayerPages,
    layer: int,
    batch: Batch,
    tracer: Tracer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sliding_window: int | None,
    **rule: Any,
) -> Tensor:
    """An Attend, once what is its own has been given."""
    with kv.using(layer, sliding_window) as pages:
        rule["sliding_window"] = sliding_window
        return paged_attention(q, k, v, kv=pages, batch=batch, tracer=tracer, **rule)


def _skeleton(store: Source, dtype: torch.dtype) -> Skeleton:
    """The store's model, whose attentions hand latents on if its pages keep them."""
    config = parse_config(store.config, "the store's config.json")
    expand = not any(shape.latent for shape in store.layer_shapes)
    skeleton = Skeleton(config, dtype, expand=expand)
    for layer, shape in zip(skeleton.layers, store.layer_shapes, strict=True):
        if keeps_latents(layer) != shape.latent:
            raise StoreError(
                f"the installed transformers computes {type(layer).__name__} in another way than the one "
                "that the store was made with; convert the checkpoint again"
            )
    return skeleton


def _weights(
    store: Source, layers: Iterable[int], fp8_products: bool
) -> dict[BlockKey, Mapping[str, WeightSpec]]:
    blocks: dict[BlockKey, Block] = {layer: store.layers[layer] for layer in layers}
    blocks |= {"embed": store.embed, "head": store.head}
    return {
        key: {name: replace(spec, fp8_rows=spec.fp8_rows and fp8_products) for name, spec in block.weights.items()}
        for key, block in blocks.items()
    }  # fmt: skip


def _read(store: Source, block: Block, device: torch.device) -> Tensor:
    return torch.frombuffer(store.read_block(block), dtype=torch.uint8).to(device)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
