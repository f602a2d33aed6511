"""benchmarks/random_store.py: what it writes without a model is what the converter would write."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from math import prod, sqrt
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from headrace.runtime.checkpoint import Checkpoint
from headrace.runtime.convert import convert
from headrace.runtime.quantize import TORCH_DTYPES, decode
from headrace.runtime.store import Block, Store

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16, "vocab_size": 4096}


@pytest.fixture(scope="module")
def random_store() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("random_store")


def config_of(random_store: ModuleType, shape: str) -> dict[str, Any]:
    config: dict[str, Any] = random_store.config_of(shape)
    return {**config, **SMALL}


def without_hash(block: Block) -> Block:
    return replace(block, file=Path(block.file.name), xxh3_64="")


@pytest.mark.parametrize(
    ("shape", "fmt"), [("tiny", "nf4"), ("tiny", "int8"), ("tiny", "bf16"), ("tiny-moe", "nf4")]
)
def test_store_is_laid_out_as_a_converted_one(
    random_store: ModuleType, tmp_path: Path, shape: str, fmt: str
) -> None:
    config = config_of(random_store, shape)
    made = random_store.write_store(tmp_path / "made", config, fmt)
    random_store.write_checkpoint(tmp_path / "checkpoint", config)
    converted = convert(tmp_path / "checkpoint", tmp_path / "converted", format=fmt)
    assert [without_hash(b) for b in made.blocks] == [without_hash(b) for b in converted.blocks]
    assert made.layer_shapes == converted.layer_shapes
    assert (made.config, made.format, made.dtype) == (
        converted.config,
        converted.format,
        converted.dtype,
    )
    made.verify()


@pytest.mark.parametrize("fmt", ["nf4", "int8", "bf16"])
def test_weights_are_of_the_promised_size(
    random_store: ModuleType, tmp_path: Path, fmt: str
) -> None:
    store = random_store.write_store(tmp_path / "made", config_of(random_store, "tiny"), fmt)
    expected = 0.02 / sqrt(2)
    for block in store.blocks:
        for name, weight in weights_of(store, block).items():
            if weight.dim() < 2:
                assert bool((weight == 1).all()), name
            else:
                assert float(weight.square().mean().sqrt()) == pytest.approx(expected, rel=0.15)
                assert abs(float(weight.mean())) < expected / 5


def weights_of(store: Store, block: Block) -> dict[str, torch.Tensor]:
    data = torch.frombuffer(store.read_block(block), dtype=torch.uint8)
    weights = {}
    for name, spec in block.weights.items():
        parts = {
            role: data[part.offset : part.offset + part.nbytes]
            .view(TORCH_DTYPES[part.dtype])
            .reshape(part.shape)
            for role, part in spec.parts.items()
        }
        weights[name] = decode(spec, parts, torch.float32)
    return weights


def test_a_finished_store_is_opened_and_another_one_refused(
    random_store: ModuleType, tmp_path: Path
) -> None:
    config = config_of(random_store, "tiny")
    first = random_store.write_store(tmp_path / "made", config, "int8")
    before = first.blocks[1].file.stat().st_mtime_ns
    again = random_store.write_store(tmp_path / "made", config, "int8")
    assert again.digest == first.digest
    assert again.blocks[1].file.stat().st_mtime_ns == before
    with pytest.raises(Exception, match="already a store"):
        random_store.write_store(tmp_path / "made", {**config, "hidden_size": 128}, "int8")


def test_checkpoint_comes_in_shards(random_store: ModuleType, tmp_path: Path) -> None:
    config = config_of(random_store, "tiny")
    random_store.write_checkpoint(tmp_path, config, shard_bytes=200_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    found = Checkpoint(tmp_path)
    wanted = random_store.tensors_of(config)
    # Small tensors are followed by padding, which is no weight.
    names = {name for name in found.weights if not name.startswith("pad.")}
    assert names == {entry.name for entry in wanted}
    assert sum(prod(found.weights[e.name].shape) for e in wanted) == sum(
        prod(e.shape) for e in wanted
    )
