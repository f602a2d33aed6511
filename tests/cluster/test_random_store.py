"""A random store: what is written without a model is what the converter would write."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod, sqrt
from pathlib import Path

import pytest
from small_shapes import small_config
from stored import stored_weights

from headrace.cluster.bench.random_store import (
    check_room,
    tensors_of,
    write_checkpoint,
    write_store,
)
from headrace.runtime.conversion.checkpoint import Checkpoint
from headrace.runtime.conversion.convert import convert
from headrace.runtime.manifest import Block
from headrace.scheduler.errors import HeadraceError


def without_hash(block: Block) -> Block:
    return replace(block, file=Path(block.file.name), xxh3_64="")


@pytest.mark.parametrize(
    ("shape", "fmt"),
    [("8b", "nf4"), ("8b", "int8"), ("8b", "int4"), ("1b", "bf16")]
    + [(shape, "nf4") for shape in ("qwen3-235b", "mixtral-8x7b", "deepseek-v3")],
)
def test_store_is_laid_out_as_a_converted_one(tmp_path: Path, shape: str, fmt: str) -> None:
    config = small_config(shape)
    made = write_store(tmp_path / "made", config, fmt)
    write_checkpoint(tmp_path / "checkpoint", config)
    converted = convert(tmp_path / "checkpoint", tmp_path / "converted", format=fmt)
    assert [without_hash(b) for b in made.blocks] == [without_hash(b) for b in converted.blocks]
    assert made.layer_shapes == converted.layer_shapes
    assert (made.config, made.format, made.dtype) == (
        converted.config,
        converted.format,
        converted.dtype,
    )
    made.verify()


@pytest.mark.parametrize("fmt", ["nf4", "int8", "int4", "bf16"])
def test_weights_are_of_the_promised_size(tmp_path: Path, fmt: str) -> None:
    store = write_store(tmp_path / "made", small_config("8b"), fmt)
    expected = 0.02 / sqrt(2)
    for block in store.blocks:
        for name, weight in stored_weights(store, block).items():
            if weight.dim() < 2:
                assert bool((weight == 1).all()), name
            else:
                assert float(weight.square().mean().sqrt()) == pytest.approx(expected, rel=0.15)
                assert abs(float(weight.mean())) < expected / 5


def test_a_finished_store_is_opened_and_another_one_refused(tmp_path: Path) -> None:
    config = small_config("8b")
    first = write_store(tmp_path / "made", config, "int8")
    before = first.blocks[1].file.stat().st_mtime_ns
    again = write_store(tmp_path / "made", config, "int8")
    assert again.digest == first.digest
    assert again.blocks[1].file.stat().st_mtime_ns == before
    with pytest.raises(Exception, match="already a store"):
        write_store(tmp_path / "made", {**config, "hidden_size": 128}, "int8")


def test_checkpoint_comes_in_shards(tmp_path: Path) -> None:
    config = small_config("8b")
    write_checkpoint(tmp_path, config, shard_bytes=60_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    found = Checkpoint(tmp_path)
    wanted = tensors_of(config)
    # Small tensors are followed by padding, which is no weight.
    names = {name for name in found.weights if not name.startswith("pad.")}
    assert names == {entry.name for entry in wanted}
    assert sum(prod(found.weights[e.name].shape) for e in wanted) == sum(
        prod(e.shape) for e in wanted
    )


def test_layers_that_will_not_do_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    def check(layers: Sequence[int]) -> None:
        raise HeadraceError(f"{len(layers)} layers")

    with pytest.raises(HeadraceError, match="2 layers"):
        write_store(tmp_path / "made", small_config("8b"), "nf4", check=check)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("free", "advice"), [(1500, "use --layers 2 or another"), (999, "use another")]
)
def test_a_drive_without_room_is_refused(free: int, advice: str) -> None:
    blocks = [300, 500, 500, 500, 200]
    with pytest.raises(HeadraceError, match=rf"/drive has .* takes 1.95 KiB: {advice} --directory"):
        check_room(Path("/drive"), blocks, sum(blocks), free)
    check_room(Path("/drive"), blocks, 500, 1500)
