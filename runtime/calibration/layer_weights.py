"""A layer's weights as they lie in device memory, unquantized, by name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.runtime.manifest import Block, WeightSpec
from headrace.runtime.skeleton import Role
from headrace.runtime.weights.view import view_weight


class LayerWeights:
    """The weights of `block`, whose bytes are `data` (uint8); `roles` says what they are for.

    `changed` are weights that are going to be others than they are in the layer now.
    """

    def __init__(self, block: Block, data: Tensor, roles: Mapping[str, Role]) -> None:
        self.block = block
        self.data = data
        self.roles = {name: roles[name] for name in block.weights}
        self.changed: dict[str, Tensor] = {}
        self._names = {spec.parts["data"].offset: name for name, spec in block.weights.items()}

    @property
    def device(self) -> torch.device:
        return self.data.device

    def name_of(self, spec: WeightSpec) -> str:
        """Of a weight that a view is asked for."""
        return self._names[spec.parts["data"].offset]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.block.weights[name].shape

    def is_raw(self, name: str) -> bool:
        return self.block.weights[name].format == "raw"

    def raw(self, name: str) -> Tensor:
        """The values where they lie, in their own type: what is written to them is what the layer has."""
        spec = self.block.weights[name]
        part = spec.parts["data"]
        data = self.data[part.offset : part.offset + part.nbytes]
        return data.view(TORCH_DTYPES[part.dtype]).view(spec.shape)

    def values(self, name: str) -> Tensor:
        """A copy in float32, of what the weight is going to be."""
        if name in self.changed:
            return self.changed[name].to(torch.float32, copy=True)
        weight = view_weight(self.block.weights[name], self.data)
        return weight.dense(torch.float32).clone()

    def part(self, name: str, expert: int) -> Tensor:
        """A copy in float32 of one matrix of a stack."""
        weight = view_weight(self.block.weights[name], self.data).expert(expert)
        return weight.dense(torch.float32).clone()

    def beside(self, name: str) -> str | None:
        """The bias of the module whose weight is `name`."""
        module = self.roles[name].module
        return next(
            (n for n, r in self.roles.items() if r.module == module and r.attribute == "bias"), None
        )

    @contextmanager
    def restored(self, *names: str) -> Iterator[None]:
        """Puts these weights back as they were."""
        saved = [self.raw(name).clone() for name in names]
        try:
            yield
        finally:
            for name, values in zip(names, saved, strict=True):
                self.raw(name).copy_(values)
