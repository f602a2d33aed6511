"""A whole model in this process, slice by slice: what a ring computes, with its logits in reach."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from headrace.runtime.batch import Batch
from headrace.runtime.kv.store import KVStore
from headrace.runtime.matmul.packed_cpu import PackedLayout
from headrace.runtime.model import StageModel
from headrace.runtime.store import Store
from headrace.scheduler.kv_format import FORMATS
from headrace.scheduler.plan import MicroBatch, Slice

CPU = torch.device("cpu")


class WholeModel:
    """Every layer of a store, bound for good."""

    def __init__(
        self,
        path: Path,
        *,
        dtype: torch.dtype = torch.float32,
        pages: int = 64,
        layout: PackedLayout | None = None,
        device: torch.device = CPU,
        kv_format: str | None = None,
        tails: int = 1,
    ) -> None:
        self._device = device
        store = Store.open(path)
        layers = range(len(store.layers))
        self._layers = layers
        self.model = StageModel(
            store, layers, device=device, dtype=dtype, with_embedding=True, with_head=True
        )
        for layer in layers:
            data = torch.frombuffer(store.read_block(store.layers[layer]), dtype=torch.uint8)
            data = data.to(device)
            if layout is not None:
                self.model.pack(layer, data, layout)
            self.model.bind(layer, data)
        fmt = FORMATS[kv_format] if kv_format else None
        shapes = dict(enumerate(store.layer_shapes))
        self._kv = KVStore(shapes, pages, dtype, device, fmt, tails)

    @torch.inference_mode()
    def logits(self, slices: Sequence[Slice]) -> Tensor:
        """One micro-batch; the logits of all its tokens [T, vocabulary]."""
        batch = Batch.build(MicroBatch(tuple(slices)), self._device)
        prepared = self.model.prepare(batch)
        x = prepared.x
        for layer in self._layers:
            x = self.model.run_layer(layer, x, prepared, self._kv)
        return self.model.logits(x)
