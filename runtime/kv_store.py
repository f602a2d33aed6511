"""Keys and values of one stage's layers, in pages of 64 tokens with the same ids on every stage."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from headrace.runtime.store import LayerShape
from headrace.scheduler.plan import PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's pages: `k` is [pages, kv_heads, 64, k_dim], `v` is [pages, kv_heads, 64, v_dim].

    Both are views of one buffer, in which a page is one contiguous extent: for each head its keys,
    then its values.
    """

    k: Tensor
    v: Tensor


class KVStore:
    """Page tensors for the layers in `shapes`, allocated once, zeroed, and never resized."""

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert num_pages > 0, num_pages
        self._buffers: dict[int, Tensor] = {}
        self._layers: dict[int, LayerKV] = {}
        for layer, shape in shapes.items():
            head_elements = PAGE_TOKENS * (shape.k_dim + shape.v_dim)
            size = (num_pages, shape.kv_heads, head_elements)
            self._buffers[layer] = torch.zeros(size, dtype=dtype, device=device)
            self._layers[layer] = _views(self._buffers[layer], shape)

    @staticmethod
    def page_nbytes(shape: LayerShape, dtype: torch.dtype) -> int:
        """Bytes of one page of one layer."""
        return PAGE_TOKENS * shape.kv_heads * (shape.k_dim + shape.v_dim) * dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes held, over all layers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def layer(self, index: int) -> LayerKV:
        return self._layers[index]

    def page_bytes(self, layer: int) -> int:
        """Bytes of one page of this layer, contiguous in memory."""
        return self._buffers[layer][0].nbytes

    def close(self) -> None:
        self._layers.clear()
        self._buffers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _views(buffer: Tensor, shape: LayerShape) -> LayerKV:
    keys = PAGE_TOKENS * shape.k_dim
    size = (*buffer.shape[:2], PAGE_TOKENS)
    return LayerKV(
        k=buffer[:, :, :keys].view(*size, shape.k_dim),
        v=buffer[:, :, keys:].view(*size, shape.v_dim),
    )
