"""From a checkpoint and what stays of it to a smaller checkpoint, whose bytes are made as they are read."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from headrace.runtime.conversion.checkpoint import Checkpoint
from headrace.runtime.conversion.layer_facts import signature
from headrace.runtime.conversion.plan import FLOATS
from headrace.runtime.conversion.quantize import TORCH_DTYPES
from headrace.runtime.conversion.source import SourceWeight
from headrace.runtime.pruning.config import kv_heads, with_head_groups, with_layers, with_neurons
from headrace.runtime.pruning.cut import Cut, CutTensor
from headrace.runtime.pruning.pattern import Pattern
from headrace.runtime.pruning.trial import refuse_other_shapes
from headrace.runtime.pruning.units import head_groups, neurons, refuse_mixture
from headrace.runtime.skeleton import Role, Skeleton, parse_config
from headrace.scheduler.errors import StoreError, UnsupportedModelError

_PAD = re.compile(r"pad\.\d+\.rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True, eq=False)
class Stays:
    """What is left of a model. Everything goes by the whole model's layers, of which `layers` stay, ascending.

    `neurons` and `groups` (of attention heads) are those that stay of each layer, ascending, as many in each;
    empty: all of them. With a `pattern`, weights of the layers' linears become zero; `norms` are those of their
    inputs' features, by layer and linear: Wanda's. Without them the magnitude decides.
    """

    layers: tuple[int, ...]
    neurons: Mapping[int, Tensor] = field(default_factory=dict)
    groups: Mapping[int, Tensor] = field(default_factory=dict)
    pattern: Pattern | None = None
    norms: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)


class Subject:
    """A checkpoint that is to be pruned, and the shapes of its model.

    `linears` are the names of each layer's linears. Raises StoreError or UnsupportedModelError where it cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.origin = str(checkpoint.path / "config.json")
        self.config = parse_config(checkpoint.config, self.origin)
        self.skeleton = self._skeleton(self.config)
        self.weights = {n: w for n, w in checkpoint.weights.items() if not _PAD.fullmatch(n)}
        self.roles = self.skeleton.classify(self.weights)

    def _skeleton(self, config: PretrainedConfig) -> Skeleton:
        return Skeleton(config, TORCH_DTYPES[self.checkpoint.dtype])

    @property
    def layers(self) -> list[nn.Module]:
        return self.skeleton.layers

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values in each layer."""
        return kv_heads(self.config)

    def linears(self, layer: int) -> tuple[str, ...]:
        """Names, in the layer, of its linears that are stored as matrices."""
        return tuple(
            self.within(role)
            for role in self.roles.values()
            if role.kind == "linear" and role.block == layer
        )

    def within(self, role: Role) -> str:
        """The name in its layer of the module that a tensor belongs to."""
        return role.module.removeprefix(f"{self.skeleton.layers_path}.{role.block}.")

    def weight(self, layer: int, linear: str) -> SourceWeight:
        """The matrix of a layer's linear."""
        target = f"{self.skeleton.layers_path}.{layer}.{linear}.weight"
        return next(self.weights[n] for n, role in self.roles.items() if role.target == target)

    def without(self, stays: Stays) -> Checkpoint:
        """The smaller checkpoint. Raises UnsupportedModelError where no config.json can describe it."""
        if stays.pattern is not None:
            for layer in stays.layers:
                refuse_mixture(self.layers[layer])
        cuts = self._cuts(stays)
        numbers = {old: new for new, old in enumerate(stays.layers)}
        weights: dict[str, SourceWeight] = {}
        for name, weight in self.weights.items():
            role = self.roles[name]
            if role.kind == "unused" or isinstance(role.block, str):
                weights[name] = weight
            elif role.block in numbers:
                left = _cut(weight, cuts.get(role.target))
                moved = _renumbered(left, role.block, numbers[role.block])
                weights[moved.name] = moved
        described = self._described(stays)
        self._refuse_other_shapes(described, weights, stays)
        return self.checkpoint.changed(described, weights)

    def _cuts(self, stays: Stays) -> dict[str, Cut]:
        """By the parameters' names in memory."""
        cuts: dict[str, Cut] = {}
        for layer in stays.layers:
            mine: dict[str, Cut] = {}
            if stays.neurons:
                mine |= neurons(self.layers[layer]).cuts(stays.neurons[layer])
            if stays.groups:
                units = head_groups(self.layers[layer], self.kv_heads)
                mine |= units.cuts(stays.groups[layer])
            if stays.pattern is not None:
                norms = stays.norms.get(layer, {})
                for linear in self.linears(layer):
                    cut = mine.get(f"{linear}.weight", Cut())
                    cut = replace(cut, pattern=stays.pattern, norms=norms.get(linear))
                    mine[f"{linear}.weight"] = cut
            path = f"{self.skeleton.layers_path}.{layer}"
            cuts |= {f"{path}.{name}": cut for name, cut in mine.items()}
        return cuts

    def _described(self, stays: Stays) -> dict[str, Any]:
        described = self.checkpoint.config
        if len(stays.layers) < len(self.layers):
            described = with_layers(described, self.config, stays.layers)
            self._refuse_other_layers(described, stays.layers)
        if stays.neurons:
            described = with_neurons(described, _one_size(stays.neurons))
        if stays.groups:
            units = head_groups(self.layers[stays.layers[0]], self.kv_heads)
            heads = self.config.num_attention_heads // self.kv_heads
            groups = _one_size(stays.groups)
            described = with_head_groups(described, self.config, groups, units.each // heads)
        return described

    def _refuse_other_layers(self, described: dict[str, Any], kept: Iterable[int]) -> None:
        """Layers that would be of another kind than they were (its window, its rotation, experts or none)."""
        fewer = self._skeleton(parse_config(described, self.origin))
        for new, old in enumerate(kept):
            # In words, for classes that attend to latents are made for each model.
            if repr(signature(fewer.layers[new])) != repr(signature(self.layers[old])):
                raise UnsupportedModelError(
                    f"{self.config.model_type}: the kind of a layer follows from its index, and layer {old} "
                    f"would be another as layer {new}; drop other layers (--drop-layers 3,7 names them)"
                )

    def _refuse_other_shapes(
        self, described: dict[str, Any], weights: Mapping[str, SourceWeight], stays: Stays
    ) -> None:
        if not stays.neurons and not stays.groups:
            return
        smaller = self._skeleton(parse_config(described, self.origin))
        state = smaller.model.state_dict(keep_vars=True)
        # Experts are never cut, and are pieces of what there is in memory.
        roles = {
            name: role
            for name, role in smaller.classify(weights).items()
            if role.kind not in ("unused", "expert")
        }
        left = {name: weights[name].shape for name in roles}
        built = {name: tuple(state[role.target].shape) for name, role in roles.items()}
        try:
            refuse_other_shapes(left, built)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self.config.model_type}: {error}") from error


def _one_size(kept: Mapping[int, Tensor]) -> int:
    sizes = {len(units) for units in kept.values()}
    assert len(sizes) == 1, sizes
    return sizes.pop()


def _cut(weight: SourceWeight, cut: Cut | None) -> SourceWeight:
    if cut is None:
        return weight
    if weight.format != "raw" or weight.repacking or weight.data.dtype not in FLOATS:
        kind = weight.data.dtype if weight.format == "raw" else weight.format
        raise StoreError(
            f"{weight.name} is {kind} already: of quantized checkpoints only whole layers can be dropped; "
            "prune the original one, with --format for what it is to become"
        )
    part, data = weight.parts[0]
    if cut.pattern is not None and not cut.pattern.fits(cut.shape(weight.shape)[-1]):
        raise StoreError(
            f"{weight.name} has {cut.shape(weight.shape)[-1]} columns, which are no whole groups of "
            f"{cut.pattern.of}: --sparsity {cut.pattern} cannot be had"
        )
    left = CutTensor(data, cut)
    entry = replace(part.entry, shape=left.shape)
    return replace(weight, shape=left.shape, parts=((replace(part, entry=entry), left),))


def _renumbered(weight: SourceWeight, old: int, new: int) -> SourceWeight:
    """The same weight of another layer: the first number in a name is the layer's."""
    if old == new:
        return weight

    def moved(name: str) -> str:
        return re.sub(rf"(^|\.){old}\.", rf"\g<1>{new}.", name, count=1)

    parts = tuple(
        (replace(part, entry=replace(part.entry, name=moved(part.entry.name))), data)
        for part, data in weight.parts
    )
    repacking = weight.repacking
    if repacking is not None:
        stored = tuple(
            replace(part, entry=replace(part.entry, name=moved(part.entry.name)))
            for part in repacking.parts
        )
        repacking = replace(repacking, parts=stored)
    return replace(weight, name=moved(weight.name), parts=parts, repacking=repacking)
