"""Keys and values of one micro-batch in one layer, in memory that all layers share."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Self

import torch

from headrace.runtime.kv.store import KVStore, LayerKV, QuantizedKV
from headrace.runtime.manifest import LayerShape


class SweepPages:
    """So many pages of each kind of layer: a layer has attended before the next one writes."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        forms = [(shape.kv_heads, shape.k_dim, shape.v_dim, shape.latent) for shape in shapes]
        self._kinds = [forms.index(form) for form in forms]
        kinds = {kind: shapes[kind] for kind in self._kinds}
        self._store = KVStore(kinds, num_pages, dtype, device)

    def using(
        self, layer: int, window: int | None
    ) -> AbstractContextManager[LayerKV | QuantizedKV]:
        """Where the layer's keys and values are while it attends."""
        return self._store.using(self._kinds[layer], window)

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
