"""A whole model in this process, slice by slice: what a ring computes, with its logits in reach."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from stored import stored_weights
from torch import Tensor

from headrace.runtime.batch import Batch
from headrace.runtime.conversion.convert import convert
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


@torch.inference_mode()
def compared(store: Path, plain: Path, model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """Our logits of a store, and a plain store's with the values that the former's bytes stand for."""
    opened = Store.open(store)
    values = {n: w for block in opened.blocks for n, w in stored_weights(opened, block).items()}
    model.save_pretrained(plain / "src")
    file = plain / "src" / "model.safetensors"
    before = load_file(file)
    assert values.keys() == before.keys()
    assert any(not torch.equal(values[n], before[n]) for n in values)
    save_file(values, file, {"format": "pt"})
    convert(plain / "src", plain / "store", format="keep", allow_missing_tokenizer=True)
    prompt = Slice(0, 0, tuple(range(3, 40)), (1,), None)
    return WholeModel(store).logits([prompt]), WholeModel(plain / "store").logits([prompt])
