"""Models that can be swept: stores, and checkpoints seen as stores that were never written."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from headrace.runtime.conversion.opening import open_checkpoint
from headrace.runtime.conversion.plan import BlockPlan, Options, plan_conversion
from headrace.runtime.conversion.quantize import weight_spec
from headrace.runtime.conversion.selfcheck import check
from headrace.runtime.conversion.writer import stored_bytes
from headrace.runtime.manifest import MANIFEST, Block, LayerShape
from headrace.runtime.skeleton import parse_config
from headrace.runtime.store import Store


class CheckpointModel:
    """A checkpoint (safetensors or GGUF) as the store that `headrace convert --format keep` would make, in no file.

    A block's bytes are put together from the checkpoint's tensors when they are read. `self_check` may
    refuse the architecture, and says whether pages may keep latents. Raises StoreError or
    UnsupportedModelError as a conversion does.
    """

    def __init__(
        self, path: Path, self_check: Callable[[PretrainedConfig], bool] | None = check
    ) -> None:
        checkpoint = open_checkpoint(path)
        self.latents = self_check is None or self_check(parse_config(checkpoint.config, str(path)))
        plan = plan_conversion(checkpoint, Options("keep"), expand=not self.latents)
        self.path = path
        self.companions = checkpoint.companions
        self.config: dict[str, Any] = plan.config
        self.dtype = plan.dtype
        self.format = plan.format
        self.tied = plan.tied
        self.layer_shapes: Sequence[LayerShape] = plan.layer_shapes
        self.settings = plan.settings
        self._plans = {block.name: block for block in plan.blocks}
        self.blocks = tuple(_block(path, block) for block in plan.blocks)
        self.embed, self.head = self.blocks[0], self.blocks[-1]
        self.layers = self.blocks[1:-1]

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def read_block(self, block: Block) -> bytearray:
        """The data section that a store's block would have. StoreError when a file cannot be read."""
        plan = self._plans[block.name]
        data = bytearray(block.nbytes)
        for weight in plan.weights:
            filled: dict[str, int] = {}
            for name, piece in stored_bytes(weight):
                at = filled.setdefault(name, plan.layout.tensors[name].offset)
                data[at : at + len(piece)] = piece
                filled[name] = at + len(piece)
        return data


SweptModel = Store | CheckpointModel


def open_model(
    path: Path, self_check: Callable[[PretrainedConfig], bool] | None = check
) -> SweptModel:
    """The store or the checkpoint in `path`, whole; `self_check` is of checkpoints. Raises StoreError, saying what
    it is instead."""
    is_checkpoint = path.is_file() or (path / "config.json").exists() or any(path.glob("*.gguf"))
    if (path / MANIFEST).exists() or not is_checkpoint:
        store = Store.open(path)
        store.require(store.blocks)
        return store
    return CheckpointModel(path, self_check)


def _block(path: Path, plan: BlockPlan) -> Block:
    tensors = plan.layout.tensors
    weights = {
        weight.source.name: weight_spec(
            weight.format,
            weight.source.shape,
            weight.parts,
            tensors,
            None if weight.encoded else weight.source.state,
        )
        for weight in plan.weights
    }
    return Block(plan.name, path / plan.name, 0, plan.layout.nbytes, "", weights)
