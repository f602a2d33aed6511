"""Keys and values of one stage's layers, in pages of 64 tokens with the same ids on every stage.

Pages of a plain format hold numbers. Those of a quantized one are written once, when they are full,
and never again; until then a sequence's newest page is in its tail, as computed. A query sees its own
page as it was computed and every page before that quantized, whoever else was computed with it: what
it sees depends on its position alone.

Of a layer that keeps latents (latents.py), a key is its value, and after it what is kept as a key: what
both have in common is kept once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from headrace.runtime.dtypes import name_of
from headrace.runtime.kv.codes import Rotation
from headrace.runtime.manifest import LayerShape
from headrace.runtime.memory.held import Holding, named
from headrace.scheduler.kv_format import FORMATS, PLAIN, SCALE_BYTES, KVFormat
from headrace.scheduler.plan import PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's pages: `k` is [pages, kv_heads, 64, k_dim], `v` is [pages, kv_heads, 64, v_dim].

    Both are views of one buffer, in which a page is one contiguous extent: for each head its keys,
    then its values. `latent`: see `whole_keys`.
    """

    k: Tensor
    v: Tensor
    latent: bool = False

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def k_dim(self) -> int:
        return self.k.shape[-1]

    @property
    def v_dim(self) -> int:
        return self.v.shape[-1]


@dataclass(frozen=True, slots=True)
class Coded:
    """A layer's keys or its values, full pages of which are quantized.

    codes [pages, kv_heads, 64, code bytes]; scales [pages, kv_heads, fmt.scales, 64] float16; tails
    [tails, kv_heads, 64, dim] in the compute type. Both are of `rotation.keys`, if there is one.
    """

    codes: Tensor
    scales: Tensor
    tails: Tensor
    fmt: KVFormat
    rotation: Rotation | None


@dataclass(frozen=True, slots=True)
class QuantizedKV:
    """One layer's quantized pages and the tails.

    A page is one contiguous extent of bytes: for each head the codes of its keys, those of its values,
    the scales of its keys, and those of its values. `latent`: see `whole_keys`.
    """

    k: Coded
    v: Coded
    latent: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The compute type."""
        return self.k.tails.dtype

    @property
    def kv_heads(self) -> int:
        return self.k.tails.shape[1]

    @property
    def k_dim(self) -> int:
        return self.k.tails.shape[-1]

    @property
    def v_dim(self) -> int:
        return self.v.tails.shape[-1]

    def rotate(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [..., dim] of the compute type, rotated as pages hold them."""
        own = self.k.rotation
        if own is None:
            return q, k, v
        if self.v.rotation is None:
            return own.queries(q), own.keys(k), v
        common, rest = q.split([self.v_dim, k.shape[-1]], dim=-1)
        q = torch.cat([self.v.rotation.queries(common), own.queries(rest)], dim=-1)
        return q, own.keys(k), self.v.rotation.keys(v)

    def rotate_back(self, out: Tensor) -> Tensor:
        """What attention gives [..., v_dim], as it is of values that are not rotated."""
        return out if self.v.rotation is None else self.v.rotation.restored(out)


def whole_keys(kv: LayerKV | QuantizedKV, k: Tensor, v: Tensor) -> Tensor:
    """Keys as queries see them, of what is kept as keys k and values v [..., dim] of the same tokens."""
    return torch.cat([v, k], dim=-1) if kv.latent else k


class LayerPages(Protocol):
    """Where layers find the pages of one micro-batch."""

    def using(
        self, layer: int, window: int | None
    ) -> AbstractContextManager[LayerKV | QuantizedKV]:
        """The pages that the micro-batch's page table names, while the layer writes to them and reads
        them. A query sees no further back than `window` keys, if that is given."""


class KVStore:
    """Pages and tails of the layers in `shapes`, allocated once, zeroed, and never resized.

    `dtype` is the compute type. `fmt` is that type, if it is not given.
    """

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        fmt: KVFormat | None = None,
        num_tails: int = 0,
    ) -> None:
        self._fmt = fmt = fmt or plain_format(dtype)
        assert num_pages > 0 and (num_tails > 0 or not fmt.is_quantized), (num_pages, num_tails)
        self._shapes = shapes
        self._pages: dict[int, Tensor] = {}
        self._tails: dict[int, tuple[Tensor, ...]] = {}
        self._layers: dict[int, LayerKV | QuantizedKV] = {}
        self._rotations = {dim: Rotation.of(dim, dtype, device) for dim in _rotated(shapes, fmt)}
        for layer, shape in shapes.items():
            size = num_pages, shape.page_bytes(fmt)
            self._pages[layer] = torch.zeros(size, dtype=torch.uint8, device=device)
            if fmt.is_quantized:
                tail = num_tails, shape.kv_heads, PAGE_TOKENS
                self._tails[layer] = tuple(
                    torch.zeros(*tail, dim, dtype=dtype, device=device)
                    for dim in (shape.k_dim, shape.v_dim)
                )
            self._layers[layer] = self.over(layer, self._pages[layer])

    @property
    def nbytes(self) -> int:
        """Bytes held, over all layers."""
        tails = (tail for tails in self._tails.values() for tail in tails)
        return sum(tensor.nbytes for tensor in (*self._pages.values(), *tails))

    def layer(self, index: int) -> LayerKV | QuantizedKV:
        return self._layers[index]

    def over(self, layer: int, pages: Tensor) -> LayerKV | QuantizedKV:
        """The layer with the tails it has and with other `pages`, uint8 [n, page_bytes(layer)]."""
        shape = self._shapes[layer]
        pages = pages.unflatten(1, (shape.kv_heads, -1))
        if not self._fmt.is_quantized:
            return _plain(pages.view(_DTYPES[self._fmt.name]), shape)
        return _quantized(pages, self._tails[layer], shape, self._fmt, self._rotations)

    def using(
        self, layer: int, window: int | None
    ) -> AbstractContextManager[LayerKV | QuantizedKV]:
        """Where the layer's keys and values are while it attends."""
        return nullcontext(self._layers[layer])

    @property
    def is_quantized(self) -> bool:
        return self._fmt.is_quantized

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers' indices, in the order of `shapes`."""
        return tuple(self._pages)

    def pages(self, layer: int) -> Tensor:
        """All pages of this layer as they lie in memory: uint8 [pages, page_bytes(layer)]."""
        return self._pages[layer]

    def tails(self, layer: int) -> tuple[Tensor, ...]:
        """Tails of this layer's keys and values, each [tails, kv_heads, 64, dim]; none of plain pages."""
        return self._tails.get(layer, ())

    def page_bytes(self, layer: int) -> int:
        """Bytes of one page of this layer, contiguous in memory."""
        return self._pages[layer][0].nbytes

    def memory(self) -> Iterator[Holding]:
        """Pages and tails."""
        yield from named("kv", self._pages.values())
        yield from named("tails", (tail for tails in self._tails.values() for tail in tails))

    def close(self) -> None:
        self._layers.clear()
        self._pages.clear()
        self._tails.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_DTYPES = {name: getattr(torch, dtype) for dtype, name in PLAIN.items()}


def plain_format(dtype: torch.dtype) -> KVFormat:
    """Pages of the numbers of that type."""
    return FORMATS[PLAIN[name_of(dtype)]]


def _rotated(shapes: Mapping[int, LayerShape], fmt: KVFormat) -> set[int]:
    """Dimensions of what is rotated: keys, and values that are parts of keys."""
    if not fmt.is_rotated:
        return set()
    latents = {shape.v_dim for shape in shapes.values() if shape.latent}
    return {shape.k_dim for shape in shapes.values()} | latents


def _plain(pages: Tensor, shape: LayerShape) -> LayerKV:
    """[pages, kv_heads, numbers of a head], cut into keys and values."""
    k, v = pages.split([PAGE_TOKENS * shape.k_dim, PAGE_TOKENS * shape.v_dim], dim=-1)
    k, v = (part.unflatten(-1, (PAGE_TOKENS, -1)) for part in (k, v))
    return LayerKV(k, v, shape.latent)


def _quantized(
    pages: Tensor,
    tails: Sequence[Tensor],
    shape: LayerShape,
    fmt: KVFormat,
    rotations: Mapping[int, Rotation],
) -> QuantizedKV:
    """[pages, kv_heads, bytes of a head], cut into codes and scales."""
    codes = [PAGE_TOKENS * fmt.code_bytes(dim) for dim in (shape.k_dim, shape.v_dim)]
    scales = [PAGE_TOKENS * fmt.scales * SCALE_BYTES] * 2
    *codes_of, k_scales, v_scales = pages.split([*codes, *scales], dim=-1)
    k_codes, v_codes = (
        part.view(torch.int8 if fmt.bits == 8 else torch.uint8).unflatten(-1, (PAGE_TOKENS, -1))
        for part in codes_of
    )
    k_scales, v_scales = (
        part.view(torch.float16).unflatten(-1, (fmt.scales, PAGE_TOKENS))
        for part in (k_scales, v_scales)
    )
    v_rotation = rotations.get(shape.v_dim) if shape.latent else None
    return QuantizedKV(
        k=Coded(k_codes, k_scales, tails[0], fmt, rotations.get(shape.k_dim)),
        v=Coded(v_codes, v_scales, tails[1], fmt, v_rotation),
        latent=shape.latent,
    )
