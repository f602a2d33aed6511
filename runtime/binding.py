"""Which tensor of a block goes where in the model: worked out once, carried out at every bind."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.core_model_loading import build_glob_alternation

from headrace.runtime import latents, plugs
from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.runtime.expert_extents import Extent
from headrace.runtime.experts import (
    BoundExperts,
    ExpertsInBlock,
    ExpertSpecs,
    Fetch,
    FetchedExperts,
    Obtain,
    SlotViews,
)
from headrace.runtime.linear import QuantLinear
from headrace.runtime.manifest import WeightSpec
from headrace.runtime.norms import FusedNorms
from headrace.runtime.recording import Interruptions
from headrace.runtime.skeleton import BlockKey, Role, Skeleton
from headrace.runtime.weights.view import view_weight
from headrace.runtime.weights.weight import Scratch, Weight
from headrace.scheduler.errors import StoreError

View = Callable[[WeightSpec, Tensor], Weight]
"""What reads a weight from a block's bytes."""


class Binding(Protocol):
    """Puts one module's weights in place, as views of a block's bytes."""

    @property
    def is_static(self) -> bool:
        """Whether it reads the block's bytes wherever they are then, with no copy made of them."""

    @property
    def factors(self) -> tuple[WeightSpec, ...]:
        """Weights of which x @ weight.T is all that is done with them."""

    def bind(self, block: Tensor, view: View = view_weight) -> None: ...


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear layer that multiplies by packed bytes. `whole`: all its values are asked for instead."""

    module: QuantLinear
    spec: WeightSpec
    whole: bool = False

    @property
    def is_static(self) -> bool:
        return True

    @property
    def factors(self) -> tuple[WeightSpec, ...]:
        return () if self.whole else (self.spec,)

    def bind(self, block: Tensor, view: View = view_weight) -> None:
        self.module.weight = view(self.spec, block)


@dataclass(frozen=True, slots=True)
class Dense:
    """A parameter or buffer that the model uses as it is, in its own type; a view if possible."""

    module: nn.Module
    attribute: str
    spec: WeightSpec
    shape: torch.Size
    dtype: torch.dtype

    @property
    def is_static(self) -> bool:
        return (
            self.spec.format == "raw" and TORCH_DTYPES[self.spec.parts["data"].dtype] == self.dtype
        )

    @property
    def factors(self) -> tuple[WeightSpec, ...]:
        return ()

    def bind(self, block: Tensor, view: View = view_weight) -> None:
        value = view(self.spec, block).dense(self.dtype).view(self.shape)
        if self.attribute in self.module._buffers:
            setattr(self.module, self.attribute, value)
        else:
            setattr(self.module, self.attribute, plugs.no_grad_parameter(value))


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """An experts module."""

    module: nn.Module
    specs: ExpertSpecs
    scratch: Scratch
    interrupt: Interruptions

    @property
    def is_static(self) -> bool:
        return True

    @property
    def factors(self) -> tuple[WeightSpec, ...]:
        if self.module.is_transposed:
            return ()
        return (*(spec for specs in self.specs.enter for spec in specs), *self.specs.leave)

    def bind(self, block: Tensor, view: View = view_weight) -> None:
        self._bind(ExpertsInBlock(self.specs, block, view))

    def fetched(self, extents: Sequence[Extent], fetch: Fetch, views: SlotViews) -> "FetchedStack":
        """Bind the module for good to experts that are read alone, from these extents of a block."""
        self._bind(FetchedExperts(self.specs.within(extents), fetch, views))
        return FetchedStack()

    def _bind(self, obtain: Obtain) -> None:
        bound = BoundExperts(self.specs.count, obtain, self.scratch, self.interrupt)
        setattr(self.module, plugs.EXPERT_WEIGHTS, bound)


@dataclass(frozen=True, slots=True)
class FetchedStack:
    """An experts module that has nothing to do with what is in its layer's block."""

    @property
    def is_static(self) -> bool:
        return True

    @property
    def factors(self) -> tuple[WeightSpec, ...]:
        return ()

    def bind(self, block: Tensor, view: View = view_weight) -> None:
        pass


class Binder:
    """Makes the bindings of a skeleton's blocks, for the tensors of `weights`.

    Linears of these blocks, and the LM head, become QuantLinear on the way; with `norms`, RMS norms
    become FusedNorm.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        weights: Mapping[BlockKey, Mapping[str, WeightSpec]],
        scratch: Scratch,
        interrupt: Interruptions,
        norms: FusedNorms | None = None,
    ) -> None:
        self._skeleton = skeleton
        self._interrupt = interrupt
        self._norms = norms
        self._weights = weights
        self._scratch = scratch
        self._places = skeleton.model.state_dict(keep_vars=True)
        self._float32 = _float32_names(skeleton)
        self._roles = skeleton.classify(name for block in weights.values() for name in block)

    def bindings(self, key: BlockKey) -> tuple[Binding, ...]:
        """How to bind one block, but for the embedding table.

        Raises StoreError when the block lacks a parameter of the model.
        """
        roles = {name: self._roles[name] for name in self._weights[key]}
        table = self._skeleton.embedding_name
        used = {n: role for n, role in roles.items() if role.block == key and role.target != table}
        self._check_complete(key, {role.target for role in used.values()})
        made: list[Binding] = []
        experts: dict[str, list[tuple[Role, WeightSpec]]] = defaultdict(list)
        # Packed linears first: the bias of a module that is replaced belongs to its replacement.
        for name, role in sorted(used.items(), key=lambda item: not self._packs(item[1])):
            if role.kind == "expert":
                experts[role.module].append((role, self._weights[key][name]))
            elif role.kind != "unused":
                made.append(self._binding(role, self._weights[key][name]))
        return (*made, *(self._stack(path, pieces) for path, pieces in experts.items()))

    def table(self) -> WeightSpec:
        """The embedding table."""
        for name, spec in self._weights["embed"].items():
            if self._roles[name].target == self._skeleton.embedding_name:
                return spec
        raise StoreError("the store's first block holds no embedding table")

    def _packs(self, role: Role) -> bool:
        return role.kind == "linear" or role.target == self._skeleton.head_name

    def _binding(self, role: Role, spec: WeightSpec) -> Binding:
        place = self._places[role.target]
        if place.numel() != prod(spec.shape):
            raise StoreError(
                f"{role.target} is {list(spec.shape)} in the store and {list(place.shape)} by "
                "config.json; the two do not belong together"
            )
        if self._packs(role):
            return self.packed(role.module, spec)
        dtype = torch.float32 if role.target in self._float32 else place.dtype
        module = self._skeleton.model.get_submodule(role.module)
        if self._norms is not None and dtype == place.dtype:
            fused = self._norms.fused(module)
            if fused is not None:
                module = fused
                self._skeleton.model.set_submodule(role.module, fused)
        return Dense(module, role.attribute, spec, place.shape, dtype)

    def packed(self, path: str, spec: WeightSpec) -> PackedLinear:
        """Replaces the linear at `path` and binds `spec` to the replacement."""
        model = self._skeleton.model
        module = QuantLinear(model.get_submodule(path), self._scratch)
        model.set_submodule(path, module)
        return PackedLinear(module, spec, whole=latents.is_expansion(model, path))

    def _stack(self, path: str, pieces: list[tuple[Role, WeightSpec]]) -> ExpertStack:
        module = self._skeleton.model.get_submodule(path)
        enter: dict[int, dict[int, WeightSpec]] = defaultdict(dict)
        leave: dict[int, WeightSpec] = {}
        for role, spec in pieces:
            if role.attribute == "down_proj":
                leave[role.expert or 0] = spec
            else:
                enter[role.expert or 0][role.part or 0] = spec
        specs = ExpertSpecs(
            plugs.num_experts(module),
            tuple(tuple(enter[e][part] for part in sorted(enter[e])) for e in sorted(enter)),
            tuple(leave[e] for e in sorted(leave)),
        )
        for held in (len(specs.enter), len(specs.leave)):
            if held not in (1, specs.count):
                raise StoreError(f"{path} has {held} of {specs.count} experts in the store")
        return ExpertStack(module, specs, self._scratch, self._interrupt)

    def _check_complete(self, key: BlockKey, bound: set[str]) -> None:
        missing = [
            name
            for name, place in self._places.items()
            if isinstance(place, nn.Parameter)
            and name not in bound
            and name not in self._skeleton.tied_names
            and name != self._skeleton.embedding_name
            and self._skeleton.block_of(name) == key
        ]
        if missing:
            raise StoreError(
                f"block {key!r} lacks {len(missing)} parameters that the model needs, the first is "
                f"{missing[0]}; the checkpoint is incomplete"
            )


def _float32_names(skeleton: Skeleton) -> set[str]:
    """Parameters that transformers keeps in float32 whatever the model's dtype."""
    plan = skeleton.model._get_dtype_plan(skeleton.dtype)
    if not plan:
        return set()
    pattern = build_glob_alternation(list(plan))[0]
    return {name for name in skeleton.model.state_dict(keep_vars=True) if pattern.search(name)}
