"""A model without weights: transformers' own modules on the meta device, and where weights go.

The skeleton knows the shapes of the decoder layers, maps names on disk to places in memory through
transformers' own conversion mapping, and runs what lies before and after the layers by calling the
model's own forward with stand-ins for its layers. Nothing here knows an architecture by name.
"""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from headrace.runtime import latents, names, plugs
from headrace.runtime.conversion import layer_facts
from headrace.runtime.manifest import LayerShape
from headrace.runtime.stand_ins import StandIns, swapped
from headrace.scheduler.errors import StoreError, UnsupportedModelError

T = TypeVar("T")

BlockKey = int | Literal["embed", "head"]
"""A layer's index, or what comes before the first and after the last layer."""


@dataclass(frozen=True, slots=True)
class Role:
    """What one checkpoint tensor is for.

    `order` sorts a block's tensors by consumption: small tensors and routers first, then linears in
    module order, then expert by expert (gate, up, down). `module` and `attribute` name the place in
    memory; `expert` and `part` (0 gate, 1 up) the piece of a fused expert tensor that this is, None
    when the tensor is the whole. Roles of kind "unused" carry no place.
    """

    block: BlockKey
    order: tuple[int, ...]
    kind: Literal["linear", "expert", "router", "other", "unused"]
    module: str
    attribute: str
    expert: int | None = None
    part: int | None = None

    @property
    def target(self) -> str:
        return f"{self.module}.{self.attribute}" if self.module else self.attribute


def load_config(path: str | Path) -> PretrainedConfig:
    """The checkpoint's configuration, read locally and without running code from it.

    Raises StoreError when there is no readable config.json, UnsupportedModelError when transformers
    has no causal language model for it.
    """
    file = Path(path) / "config.json"
    try:
        described = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} cannot be read ({error}); name a checkpoint folder") from error
    return parse_config(described, str(file))


def parse_config(described: Mapping[str, Any], origin: str) -> PretrainedConfig:
    """The configuration in the JSON object of a config.json; `origin` names it in errors."""
    model_type = described.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{origin}: model_type {model_type!r} is unknown to the installed transformers"
        )
    config = CONFIG_MAPPING[model_type].from_dict(dict(described))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"{origin}: {model_type} is not a causal language model")
    if config.get_text_config(decoder=True) is not config:
        raise UnsupportedModelError(
            f"{origin}: {model_type} reads more than text; save its language model on its own first"
        )
    return config


class Skeleton:
    """The model of `config` on the meta device; buffers that a checkpoint does not hold are real.

    `layers` are its decoder layers, `owner` the dotted path of the module that runs them. Attentions
    hand on latents where they can, unless they are told to `expand` them.
    Raises UnsupportedModelError when no such module is found.
    """

    def __init__(
        self, config: PretrainedConfig, dtype: torch.dtype, *, expand: bool = False
    ) -> None:
        plugs.register()
        self.config = copy.deepcopy(config)
        self.dtype = dtype
        self.config._attn_implementation = plugs.ATTENTION
        self.config._experts_implementation = plugs.EXPERTS
        self.model = _build(self.config, dtype)
        self.layers_path, self.layers = _find_layers(self.model, self.config.num_hidden_layers)
        if not expand:
            latents.install(self.layers)
        self._stand_ins = StandIns(self.layers)
        self.embedding: nn.Module = self.model.get_input_embeddings()
        # Only training looks at it, but a call with fewer rows than its index would be refused.
        self.embedding.padding_idx = None
        self._blocks = _split_blocks(self.model, self.layers_path)
        self._tail = [
            name
            for name, block in self._blocks.items()
            if block == "head"
            and name.rpartition(".")[0] == self.layers_path.rpartition(".")[0]
            and next(self.model.get_submodule(name).parameters(), None) is not None
        ]

    @property
    def tied(self) -> bool:
        """Whether the LM head is the embedding table."""
        return bool(self.config.tie_word_embeddings)

    @property
    def tied_names(self) -> frozenset[str]:
        """Parameters that are another one's, and that a checkpoint need not hold."""
        return frozenset(names.tied_names(self.model))

    @property
    def head_name(self) -> str:
        """The LM head's weight, by its name in memory."""
        head = self.model.get_output_embeddings()
        return next(f"{name}.weight" for name, m in self.model.named_modules() if m is head)

    @property
    def embedding_name(self) -> str:
        """The embedding table, by its name in memory."""
        table = self.embedding
        return next(f"{name}.weight" for name, m in self.model.named_modules() if m is table)

    def block_of(self, name: str) -> BlockKey:
        """The block of a parameter or buffer, by its name in memory."""
        if name.startswith(self.layers_path + "."):
            return int(name[len(self.layers_path) + 1 :].split(".", 1)[0])
        return next(
            (block for path, block in self._blocks.items() if name.startswith(path + ".")), "head"
        )

    def classify(self, on_disk: Iterable[str]) -> dict[str, Role]:
        """The role of every tensor name; raises UnsupportedModelError for what cannot be mapped."""
        targets = names.map_names(self.model, on_disk)
        places = {name: i for i, name in enumerate(_places(self.model))}
        return {name: self._role(target, places) for name, target in targets.items()}

    def _role(self, target: names.Target | None, places: Mapping[str, int]) -> Role:
        if target is None or (target.name not in places):
            return Role("head", (), "unused", "", "")
        module_path, _, attribute = target.name.rpartition(".")
        block = self.block_of(target.name)
        kind = self._kind(module_path, attribute, block)
        rank = {"other": 0, "router": 0, "linear": 1, "expert": 2}[kind]
        place = places[target.name]
        order = (
            (rank, -1 if target.expert is None else target.expert, place, target.part or 0)
            if kind == "expert"
            else (rank, place)
        )
        return Role(block, order, kind, module_path, attribute, target.expert, target.part)

    def _kind(
        self, path: str, attribute: str, block: BlockKey
    ) -> Literal["linear", "expert", "router", "other"]:
        module = self.model.get_submodule(path)
        if plugs.is_experts(module) and attribute in names.EXPERT_MATRICES:
            return "expert"
        if isinstance(block, int) and attribute == "weight" and _is_router(self.model, path):
            return "router"
        linear = type(module) is nn.Linear and attribute == "weight" and isinstance(block, int)
        return "linear" if linear else "other"

    def enter(
        self, rows: Tensor, positions: Tensor
    ) -> tuple[Tensor, tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]]:
        """Runs what precedes the layers: `rows` [T, H] of the embedding table, `positions` [T].

        Returns the first layer's input [T, H] and, per layer, the arguments that the model gives it
        beside the hidden states (rotary embeddings among them). The table is replaced by its rows
        for the call, so that it can stay in host memory and scaling is still the reference's.
        """
        stand_ins = self._stand_ins
        stand_ins.take_calls()  # of a call that failed
        table = self.embedding.weight
        self.embedding.weight = plugs.no_grad_parameter(rows)
        try:
            with swapped(self.model, {self.layers_path: stand_ins.modules} | self._no_tail()):
                self.model.base_model(
                    input_ids=torch.arange(len(rows), device=rows.device)[None],
                    position_ids=positions[None],
                    use_cache=False,
                )
        finally:
            self.embedding.weight = table
        calls = stand_ins.take_calls()
        assert len(calls) == len(self.layers), "the model skipped a layer"
        return calls[0][0][0], tuple((args, kwargs) for _, args, kwargs in calls)

    def _no_tail(self) -> dict[str, nn.Module]:
        return {name: nn.Identity() for name in self._tail}

    def leave(self, x: Tensor) -> Tensor:
        """Runs what follows the layers on hidden states [R, H]: final norm, head, scaling, caps.

        Returns logits [R, vocabulary] in float32.
        """
        layers = {self.layers_path: self._stand_ins.modules}
        with swapped(self.model, layers), self._stand_ins.returning(x[None]):
            positions = torch.zeros(1, len(x), dtype=torch.int64, device=x.device)
            out = self.model(inputs_embeds=x[None], position_ids=positions, use_cache=False)
        logits: Tensor = out.logits[0]
        return logits.float()

    def layer_shapes(self) -> tuple[LayerShape, ...]:
        """Each layer's KV shape, learnt by running one layer of each kind up to its attention."""

        def learn(layer: nn.Module, x: Tensor, args: Any, kwargs: Any) -> LayerShape:
            kv = layer_facts.kv_shape(layer, x, args, kwargs)
            sizes = layer_facts.sizes(layer, self.config)
            return LayerShape(*kv, *sizes, latent=latents.keeps_latents(layer))

        return self._learn(learn)

    def shared_inputs(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """Each layer's linears that multiply the same tensor, by their names in the layer.

        To be asked for before any of them is replaced.
        """
        return self._learn(layer_facts.shared_inputs)

    def _learn(self, learn: Callable[[nn.Module, Tensor, Any, Any], T]) -> tuple[T, ...]:
        """What `learn` finds of each layer, given one row and what the model gives it beside it.
        Layers of one kind are looked at once."""
        rows = torch.zeros(1, self.config.hidden_size, dtype=self.dtype)
        try:
            x, calls = self.enter(rows, torch.zeros(1, dtype=torch.int64))
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot prepare its layers' arguments: {error}"
            ) from error
        learnt: dict[tuple[object, ...], T] = {}
        found = []
        for layer, (args, kwargs) in zip(self.layers, calls, strict=True):
            key = layer_facts.signature(layer)
            if key not in learnt:
                learnt[key] = learn(layer, x, args, kwargs)
            found.append(learnt[key])
        return tuple(found)


def _build(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    if hasattr(config, "quantization_config"):
        # The store describes how weights are packed; the modules are built as if they were not.
        del config.quantization_config
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise UnsupportedModelError(f"{config.model_type} cannot be built: {error}") from error
    return model.eval().requires_grad_(False)


def _find_layers(model: nn.Module, count: int) -> tuple[str, list[nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, list(module)
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {count} decoder layers")


def _split_blocks(model: nn.Module, layers_path: str) -> dict[str, Literal["embed", "head"]]:
    """Which side of the layers each module beside them, or beside one of their parents, is on."""
    blocks: dict[str, Literal["embed", "head"]] = {}
    parts = layers_path.split(".")
    for depth in range(len(parts)):
        parent = ".".join(parts[:depth])
        side: Literal["embed", "head"] = "embed"
        for name, _ in model.get_submodule(parent).named_children():
            if name == parts[depth]:
                side = "head"
            else:
                blocks[f"{parent}.{name}" if parent else name] = side
    return blocks


def _places(model: nn.Module) -> Iterator[str]:
    """Names that a checkpoint may fill, in module order: parameters and persistent buffers."""
    yield from model.state_dict(keep_vars=True)


def _is_router(model: nn.Module, path: str) -> bool:
    """Whether a module picks experts: it has one row per expert, or one, and stands beside them."""
    module = model.get_submodule(path)
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        return False
    while path := path.rpartition(".")[0]:
        counts = [
            plugs.num_experts(child)
            for child in model.get_submodule(path).children()
            if plugs.is_experts(child)
        ]
        if counts:
            return weight.shape[0] in (1, counts[0])
    return False
