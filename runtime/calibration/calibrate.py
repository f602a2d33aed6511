"""Calibrated conversion: a checkpoint to a store, layer by layer, each rounded by what it is given.

Calibration text runs through each layer as it is in the checkpoint, which shows what its matrices are given;
they are rounded and written; then the text runs through the layer as it was written, which gives what the next
layer is given. Only a few layers are in memory at a time, on a device with little memory, too.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from headrace.runtime.calibration.encoding import Method
from headrace.runtime.calibration.layer import Encoded, LayerCalibration, Tally
from headrace.runtime.calibration.layer_weights import LayerWeights
from headrace.runtime.calibration.room import Room
from headrace.runtime.calibration.states_file import StatesFile
from headrace.runtime.conversion.convert import convert
from headrace.runtime.conversion.plan import BlockPlan, ConversionPlan
from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.runtime.manifest import Block, WeightSpec
from headrace.runtime.skeleton import Role, Skeleton, parse_config
from headrace.runtime.store import Store
from headrace.runtime.sweep.source import CheckpointModel
from headrace.runtime.sweep.states import States
from headrace.runtime.sweep.sweep import Sweep, SweptLayer
from headrace.runtime.weights.view import view_weight
from headrace.runtime.weights.weight import Weight

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Calibration:
    """How to calibrate: `tokens` [sequences, length] int64 of a text whose hash is `text`.

    `device_memory` bounds, in bytes, what is held on `device`; by default memory is taken as it is free.
    """

    tokens: Tensor
    text: str
    method: Method
    device: torch.device
    device_memory: int | None = None

    def as_json(self) -> dict[str, Any]:
        sequences, length = self.tokens.shape
        return {
            "method": self.method,
            "text": self.text,
            "sequences": sequences,
            "context": length,
        }


def convert_calibrated(
    source: Path, dest: Path, calibration: Calibration, run: Callable[..., Store] = convert
) -> tuple[Store, Tally]:
    """`run`, which is `convert` with its options, calibrated; and how matrices were rounded in this run.

    Raises what `convert` does, and DoesNotFitError when the device's memory does not suffice.
    """
    with Calibrator(source, dest, calibration) as calibrator:
        store = run(source, dest, encoder=calibrator, calibration=calibration.as_json())
    return store, calibrator.tally


class Calibrator:
    """An Encoder. The layers that an earlier run wrote are run as they were written, from the last states on
    that it kept. A context manager, which keeps those states for a run to come."""

    def __init__(self, source: Path, dest: Path, calibration: Calibration) -> None:
        self._source, self._calibration = source, calibration
        self._file = StatesFile(dest)
        self._stack = ExitStack()
        self._done: Mapping[str, Block] = {}
        self._names: tuple[str, ...] = ()
        self._sweep: Sweep | None = None
        self._layers: Iterator[SweptLayer] = iter(())
        self._states: States | None = None
        self._current: SweptLayer | None = None
        self.tally = Tally()

    def start(self, plan: ConversionPlan, done: Mapping[str, Block]) -> None:
        """Nothing is read yet: a conversion may have all layers."""
        self._plan, self._done = plan, dict(done)
        self._names = tuple(block.name for block in plan.blocks[1:-1])

    def encode(self, block: BlockPlan) -> Encoded:
        if block.name not in self._names:
            return {}
        index = self._names.index(block.name)
        layer = self._reach(index)
        assert self._states is not None
        calibration = LayerCalibration(
            layer,
            self._weights(layer),
            block.weights,
            self._model.layer_shapes[index],
            self._calibration.method,
            transposed=self._transposed,
            budget=self._room.gram_bytes,
        )
        return calibration.run(self._states, self.tally)

    def written(self, block: Block) -> None:
        self._done = {**self._done, block.name: block}
        if self._current is None or block.name not in self._names:
            return
        following = self._current.index + 1
        if following < len(self._names):
            self._run_written(self._current, block)
            assert self._states is not None
            self._file.save(following, self._states.values)
        else:
            self._finish()

    def _reach(self, index: int) -> SweptLayer:
        """The layer, with the states that it is given."""
        if self._sweep is None:
            self._open(index)
        for layer in self._layers:
            if layer.index == index:
                self._current = layer
                return layer
            self._run_written(layer, self._done[self._names[layer.index]])
        raise AssertionError(f"layer {index} is asked for out of order")

    def _open(self, index: int) -> None:
        chosen = self._calibration
        # Linears that make keys of latents have to be seen at work, so latents are expanded.
        self._model = CheckpointModel(self._source, self_check=lambda _: False)
        dtype = TORCH_DTYPES[self._model.dtype]
        if chosen.device.type == "cpu":
            dtype = torch.float32
        self._skeleton_facts(dtype)
        context = chosen.tokens.shape[1]
        self._room = Room.of(
            self._model,
            self._plan,
            dtype,
            context,
            chosen.device,
            chosen.device_memory,
            method=chosen.method,
            has_head=False,
        )
        self._sweep = self._stack.enter_context(
            Sweep(
                self._model,
                chosen.device,
                dtype,
                context=context,
                device_memory=self._room.sweep_bytes,
                with_head=False,
            )
        )
        self._states = self._stack.enter_context(self._sweep.embed(chosen.tokens))
        first = self._file.layer()
        if first is None or first > index:
            first = 0
        else:
            self._file.load(first, self._states.values)
        self._layers = self._stack.enter_context(closing(self._sweep.layers(first)))

    def _skeleton_facts(self, dtype: torch.dtype) -> None:
        skeleton = Skeleton(parse_config(self._model.config, str(self._source)), dtype, expand=True)
        names = [name for block in self._model.blocks for name in block.weights]
        self._roles: Mapping[str, Role] = skeleton.classify(names)
        self._transposed = frozenset(
            name
            for name, role in self._roles.items()
            if role.kind == "expert" and skeleton.model.get_submodule(role.module).is_transposed
        )

    def _weights(self, layer: SweptLayer) -> LayerWeights:
        return LayerWeights(self._model.layers[layer.index], layer.block, self._roles)

    @torch.inference_mode()
    def _run_written(self, layer: SweptLayer, block: Block) -> None:
        """Takes the states through the layer as it is in the store."""
        assert self._states is not None
        weights = self._weights(layer)
        data = _read(block, layer.block.device)

        def view(spec: WeightSpec, _: Tensor) -> Weight:
            return view_weight(block.weights[weights.name_of(spec)], data)

        layer.rebind(view)
        layer.run(self._states)
        layer.rebind(view_weight)  # lets go of `data`: every layer has modules of its own

    def _finish(self) -> None:
        self._stack.close()
        self._file.remove()

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(block: Block, device: torch.device) -> Tensor:
    """The block's data section on a device."""
    data = bytearray(block.nbytes)
    with block.file.open("rb") as stream:
        stream.seek(block.data_offset)
        stream.readinto(data)
    return torch.frombuffer(data, dtype=torch.uint8).to(device)
