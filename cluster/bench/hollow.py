"""A store that is only described: a shape's sizes in a format, without a byte of weights."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from headrace.cluster.bench.random_store import write_hollow_checkpoint
from headrace.runtime.conversion.checkpoint import Checkpoint
from headrace.runtime.conversion.plan import BlockPlan, Options, plan_conversion
from headrace.runtime.conversion.quantize import weight_spec
from headrace.runtime.manifest import VERSION, Block, block_to_json
from headrace.runtime.store import Store


def hollow_store(config: Mapping[str, Any], fmt: str) -> Store:
    """What `headrace convert` would make of a checkpoint of that configuration; its files are not there."""
    with TemporaryDirectory(prefix="headrace-shape-") as folder:
        source = Path(folder)
        write_hollow_checkpoint(source, config)
        plan = plan_conversion(Checkpoint(source), Options(fmt))
        blocks = [block_to_json(_block(source, block), "") for block in plan.blocks]
        manifest = {
            "version": VERSION,
            "blocks": blocks,
            "layer_shapes": [],
            "format": plan.format,
            "dtype": plan.dtype,
            "tied": plan.tied,
            "source": "",
            "options": Options(fmt).as_json(),
        }
        store = Store(source, plan.config, manifest)
        store.layer_shapes, store.settings = plan.layer_shapes, plan.settings
        return store


def _block(folder: Path, block: BlockPlan) -> Block:
    specs = {
        weight.source.name: weight_spec(
            weight.format, weight.source.shape, weight.parts, block.layout.tensors
        )
        for weight in block.weights
    }
    layout = block.layout
    file = folder / f"{block.name}.safetensors"
    return Block(block.name, file, len(layout.header), layout.nbytes, "", specs)
