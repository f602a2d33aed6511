"""Stores with real blocks and hashes, made in a moment, and fine-tunes of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from headrace.runtime.block_file import BlockWriter, Entry, lay_out, write_durably
from headrace.runtime.manifest import Block, TensorSpec, WeightSpec, block_to_json
from headrace.runtime.store import Store

Values = np.ndarray[Any, np.dtype[np.uint16]]
ROWS, COLUMNS, MATRICES = 512, 512, 7
"""A layer has matrices of half a MiB."""


def random_bf16(rng: np.random.Generator, count: int) -> Values:
    """bf16 weights as models have them: normal, with a standard deviation of 0.02."""
    values = rng.standard_normal(count, dtype=np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def make_store(path: Path, layers: int = 4, seed: int = 0) -> Store:
    """bf16 matrices and a norm a layer; 3.7 MB each."""
    rng = np.random.default_rng(seed)
    path.mkdir()
    blocks = []
    for name in ("embed", *(f"layer-{i:05d}" for i in range(layers)), "head"):
        matrices = MATRICES if name.startswith("layer") else 1
        shapes = [] if name == "embed" else [(f"{name}.norm", (COLUMNS,))]
        shapes += [(f"{name}.m{i}", (ROWS, COLUMNS)) for i in range(matrices)]
        blocks.append(_write_block(path, name, shapes, rng))
    manifest = {
        "version": 1,
        "source": "f00",
        "options": {"format": "keep", "policy": [], "double_quant": False},
        "format": "bf16",
        "dtype": "BF16",
        "tied": False,
        "layer_shapes": [
            dict.fromkeys(("kv_heads", "k_dim", "v_dim"), 2)
            | dict.fromkeys(("parameters", "active_parameters", "largest_matrix"), ROWS * COLUMNS)
        ]
        * layers,
        "blocks": blocks,
    }
    write_durably(path / "headrace.json", json.dumps(manifest).encode())
    write_durably(path / "config.json", b'{"model_type": "llama"}')
    write_durably(
        path / "tokenizer.json", json.dumps({f"word{i}": i for i in range(3000)}).encode()
    )
    return Store.open(path)


def _write_block(
    path: Path, name: str, shapes: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator
) -> dict[str, Any]:
    entries = [Entry(weight, "BF16", shape) for weight, shape in shapes]
    layout, file = lay_out(entries), path / f"{name}.safetensors"
    with BlockWriter(file, layout) as writer:
        for entry in entries:
            writer.write(entry.name, random_bf16(rng, entry.nbytes // 2).tobytes())
        written = writer.finish()
    weights = {
        e.name: WeightSpec("raw", e.shape, {"data": layout.tensors[e.name]}) for e in entries
    }
    block = Block(name, file, len(layout.header), layout.nbytes, written.data_hash, weights)
    return block_to_json(block, written.header_hash)


Change = Callable[[str, Values], Values | None]
"""What becomes of a tensor, by its name and values; None leaves it."""


def fine_tune(store: Path, dest: Path, change: Change) -> Store:
    """A copy of a store with other values in its bf16 tensors, and with hashes of those."""
    shutil.copytree(store, dest)
    manifest = json.loads((dest / "headrace.json").read_bytes())
    for block, entry in zip(Store.open(dest).blocks, manifest["blocks"], strict=True):
        content = bytearray(block.file.read_bytes())
        data = memoryview(content)[block.data_offset :]
        for name, weight in block.weights.items():
            for part in weight.parts.values():
                if part.dtype == "BF16":
                    _change(data, part, name, change)
        block.file.write_bytes(content)
        entry["xxh3_64"] = xxhash.xxh3_64_hexdigest(data)
    (dest / "headrace.json").write_text(json.dumps(manifest))
    tuned = Store.open(dest)
    tuned.verify()
    return tuned


def _change(data: memoryview, part: TensorSpec, name: str, change: Change) -> None:
    place = data[part.offset : part.offset + part.nbytes]
    changed = change(name, np.frombuffer(place, np.uint16).copy())
    if changed is not None:
        place[:] = changed.tobytes()


def everywhere(share: float, seed: int = 1) -> Change:
    """That share of all elements, at random, become others of the same distribution."""
    rng = np.random.default_rng(seed)

    def change(_: str, values: Values) -> Values:
        chosen = rng.random(values.size) < share
        values[chosen] = random_bf16(rng, int(chosen.sum()))
        return values

    return change


def whole_tensors(nbytes: int, seed: int = 2) -> Change:
    """Tensors of so many bytes together become others; of the largest kind, in the order of the store."""
    rng, left = np.random.default_rng(seed), [nbytes]

    def change(_: str, values: Values) -> Values | None:
        if values.nbytes > left[0] or values.nbytes < 100_000:
            return None
        left[0] -= values.nbytes
        return random_bf16(rng, values.size)

    return change


def both(*changes: Change) -> Change:
    def change(name: str, values: Values) -> Values:
        for each in changes:
            changed = each(name, values)
            values = values if changed is None else changed
        return values

    return change
